"""The paper's frequency analysis."""
