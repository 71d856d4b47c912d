"""One expert trained: the loop, its states on disk, several processes for one expert, the trunk."""
