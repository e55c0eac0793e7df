"""The words of the field in plain words, for readers of a report who do not know them."""

from __future__ import annotations

from collections.abc import Iterator

from .attack_tables import choose_cost_columns, choose_strength_columns
from .record import RunRecord

TERMS = {
    "robust accuracy": "the share of all images that the network has right and still has right"
    " after the attack; what was wrong before counts as lost",
    "interval": "a range from a sample of images that covers the share among all such images in 95"
    " of 100 samples: (36.9–45.6) behind 41.2 %",
    "worst case": "of each image the best attack of the same kind counts",
    "linf": "no value of a pixel changes by more than the radius: 8/255 is 8 of 255 grey levels,"
    " which most people do not see",
    "l2": "the root of the sum of all squared changes; 1 is one value of a pixel from none to full",
    "l1": "the sum of all changes; 1 is one value of a pixel from none to full",
    "l0": "the number of values of an image that change, each as much as it likes",
    "l0_pixels": "the number of pixels that change, each as much as it likes",
    "ssim": "structural similarity of two images, 1 for the same; near 1 people see no difference",
    "patch": "a square anywhere on the image with any content, as a sticker would be",
    "rotation": "the image is turned and shifted, and else stays as it is",
    "corruption": "what weather, cameras and files do; nobody looks for an error",
    "eps": "the radius: how far an attacker may go",
    "white-box": "the attacker knows the network and computes with it",
    "black-box": "the attacker sees what the network answers, and nothing of its inside",
    "none": "the attacker sees nothing of the network",
    "adaptive": "the attack was made against the defense, which it knows",
    "oblivious": "the attack was made on the network alone and does not know the defense",
    "after 8 bit": "judged again with the attacked images rounded to 256 grey levels, as files hold"
    " them",
    "only this": "images that this attack fools and no other of the same kind does",
    "success": "of the images that were right, the share that the attack made wrong",
    "median distance": "how far the attack went on half of its successes",
    "mean SSIM": "how much attacked images look like the images, 1 for the same",
    "mean PSNR": "how small the change is in decibels; above 40 people hardly see it",
    "forward / back": "how often an image went through the network, and gradients back through it",
}


def explain(text: str) -> str:
    """What a word, or the first word of a title, means; empty if it needs no explanation."""
    return TERMS.get(text) or TERMS.get(text.partition(" ")[0].rstrip(","), "")


def list_terms(record: RunRecord) -> Iterator[tuple[str, str]]:
    """The words that a report uses, with their meaning."""
    columns = (*choose_strength_columns(record), *choose_cost_columns(record))
    used = {column.title for column in columns} | {"interval"}
    for case in record.worst_cases:
        used.add("rotation" if case.threat.norm == "spatial" else case.threat.norm)
        used |= {"eps"} if case.threat.eps_255 else set()
        used |= {"worst case"} if len(case.attacks) > 1 else set()
    used |= {row.knowledge for row in record.attacks}
    used |= {"adaptive", "oblivious"} if record.defenses else set()
    yield from ((name, meaning) for name, meaning in TERMS.items() if name in used)
