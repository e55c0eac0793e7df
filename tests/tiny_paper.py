"""A paper that is measured in seconds."""

from __future__ import annotations

from robusteval.analysis.papers.declaration import Paper, build_paper


def tiny(name: str) -> Paper:
    """A paper of two attacks on four images."""
    return build_paper(
        name,
        {
            "title": "On little",
            "source": "nowhere",
            "setting": "none",
            "interpreters": ["cam"],
            "explained": ["pgd"],
            "chaotic": ["fgsm"],
            "on_maps": {"map": "8/255"},
            "masked": {"quarter": "1/4"},
            "mask_attack": "fgsm:eps=0.1",
            "small": {"samples": 4, "explained": 2, "seeds": 2, "map_steps": 2, "masked": 40},
            "paper": {"samples": 4},
            "attacks": {"pgd": "pgd:eps=0.2,steps=3", "fgsm": "fgsm:eps=0.2"},
            "tables": [
                {
                    "name": "Table I",
                    "title": "Two attacks",
                    "columns": ["pgd"],
                    "unpublished": "not in the paper",
                    "rows": [
                        {"name": "fooled", "measure": "fooled"},
                        {"name": "tau", "measure": "map_kendall:cam"},
                        {"name": "promotion", "measure": "promotion"},
                        {"name": "hardened", "measure": "fooled", "hardened": True},
                        {"name": "seeds", "measure": "seeds_fooled", "attack": "fgsm"},
                        {"name": "maps", "measure": "tau_all", "attack": "map"},
                        {"name": "units", "measure": "units:mask_static", "attack": "quarter"},
                        {
                            "name": "maps there",
                            "measure": "tau_all",
                            "attack": "map",
                            "hardened": True,
                        },
                    ],
                }
            ],
            "claims": [
                {
                    "text": "Maps are kept.",
                    "where": "nowhere",
                    "more": {"attack": "map", "measure": "tau_all", "hardened": True},
                    "than": {"attack": "map", "measure": "tau_all"},
                },
                {
                    "text": "Changes lie where the map is high.",
                    "where": "nowhere",
                    "more": {"attack": "pgd", "measure": "focus:gradcam"},
                    "than": {"attack": "pgd", "measure": "focus_elsewhere:gradcam"},
                },
            ],
        },
    )
