"""The figures that the paper prints for each of its rows, for comparison. FIDs of different protocols do not compare."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """The figures of one row: parameters of its experts, MACs and scores."""

    params: tuple[str, ...]
    """Millions of parameters of each expert, or one figure for all; as printed, so that its digits say how exact it is."""
    macs: str | None = None
    """Billions of multiply-accumulates, in the paper's convention: see ``meme.scoring.cost.paper_macs``."""
    fid: float | None = None
    precision: float | None = None
    recall: float | None = None
    inception_score: float | None = None
    sfid: float | None = None


_EXPERTS = ("82.56", "82.85", "83.11", "83.32")  # Table 4

# Table 1; FFHQ by DDIM-200, CelebA-HQ by DDIM-50, 50K samples each.
PRINTED = {
    "ffhq-ldm-l":             Printed(("274.1",), "288.2", 9.14, 0.72, 0.48),  # its own training of 540K iterations
    "ffhq-ldm-s":             Printed(("89.5",),  "94.2", 11.41, 0.66, 0.44),
    "ffhq-iu-ldm-s":          Printed(("82.6",),  "90.5", 11.64, 0.65, 0.45),
    "ffhq-multi-expert-hard": Printed(("89.5",),  "94.2", 10.42, 0.69, 0.46),
    "ffhq-multi-expert":      Printed(("89.5",),  "94.2",  9.58, 0.70, 0.46),
    "ffhq-meme-hard":         Printed(_EXPERTS,   "90.4",  9.20, 0.70, 0.48),
    "ffhq-meme":              Printed(_EXPERTS,   "90.4",  8.52, 0.72, 0.50),
    "ffhq-lite-ldm":          Printed(("22.4",),  "23.6", 17.3),
    "celebahq-ldm-l":         Printed(("274.1",), "288.2", 5.92, 0.71, 0.49),
    "celebahq-ldm-s":         Printed(("89.5",),  "94.2",  9.11, 0.61, 0.45),
    "celebahq-iu-ldm-s":      Printed(("82.6",),  "90.5",  9.06, 0.60, 0.47),
    "celebahq-multi-expert":  Printed(("89.5",),  "94.2",  7.00, 0.67, 0.48),
    "celebahq-meme":          Printed(_EXPERTS,   "90.4",  5.55, 0.73, 0.49),
    "celebahq-lite-ldm":      Printed(("22.4",),  "23.6", 14.3),
    # Table 2; DDIM-50, 10K samples.
    "celeba64-adm-s":         Printed(("90",), fid=49.56),
    "celeba64-iu-adm-s":      Printed(("82",), fid=50.08),
    "celeba64-multi-expert":  Printed(("90",), fid=47.29),
    "celeba64-meme":          Printed(("82",), fid=43.09),
    # Table 8; 10K samples. No network that fits its parameters comes near its MACs.
    "imagenet-ldm-l":         Printed(("395",), "411", 13.17, 0.76, 0.61, 108.93, 19.23),
    "imagenet-meme":          Printed(("103",), "114", 13.19, 0.76, 0.61, 109.95, 19.18),
}  # fmt: skip


def printed_params(name: str, number: int) -> str | None:
    """Return the millions of parameters that the paper prints for expert ``number`` of a row; None where it has no such row."""
    row = PRINTED.get(name)
    if row is None:
        return None
    return row.params[number - 1] if len(row.params) > 1 else row.params[0]


def rounds_to(value: float, printed: str) -> bool:
    """Return whether ``value``, rounded to the number of printed digits, is what was printed."""
    digits = len(printed.partition(".")[2])
    return round(value, digits) == float(printed)
