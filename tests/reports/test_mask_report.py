"""The report of a mask: every figure and sentence of its record, in 80 columns."""

from __future__ import annotations

from dataclasses import replace

from robusteval.reports.mask import EARLY, MaskFigures, MaskRecord, render_mask
from robusteval.runs.statistics import Rate

RECORD = MaskRecord(
    file="masked.safetensors",
    layer="layer4",
    units=64,
    masked=16,
    per_class=False,
    rank="importance",
    ranked=20,
    data="bands",
    attack="pgd:eps=1/255",
    stops_early=True,
    unmasked=MaskFigures(Rate(30, 30), Rate(0, 30), Rate(0, 30)),
    mask=MaskFigures(Rate(29, 30), Rate(15, 30), Rate(3, 30)),
    random_mask=MaskFigures(Rate(28, 30), Rate(1, 30), Rate(1, 30)),
    verdict="The mask gains nothing.",
    findings=("the gradient is zero",),
)


def test_report_says_what_was_masked_and_what_it_is_worth() -> None:
    text = render_mask(RECORD)

    words = " ".join(text.split())
    assert words.startswith(
        "masked.safetensors has 16 of 64 units of layer layer4 masked, those that matter least to"
        " the logit of the true class, by 20 other images. Right of 30 images of bands"
    )
    assert "masked 96.7 (83.3-99.4) 50.0 (33.2-66.8) 10.0 (3.5-25.6)" in words
    assert words.endswith(f"The mask gains nothing. {EARLY} Note: the gradient is zero")
    assert max(map(len, text.splitlines())) <= 80


def test_masks_of_classes_and_random_ones_are_called_so() -> None:
    words = " ".join(render_mask(replace(RECORD, per_class=True, rank="random")).split())

    assert "masked for each class, drawn at random. Right" in words
