"""Some images of a data set as a data set."""

from __future__ import annotations

import numpy as np
from toys import synthetic

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.chosen import choose_images


def test_chosen_images_are_those_of_the_data_in_the_order_asked_for() -> None:
    """With their labels, content ids and names; a scale of the user's own is kept."""
    x, y = synthetic(12, 0)
    for data in (
        from_arrays(x, y, name="bands"),
        from_arrays(x.astype(np.uint16) * 2, y, name="bands", value_range=(0, 510)),
    ):
        some = choose_images(data, np.array([7, 2, 9]))

        mine, theirs = some.batch([0, 1, 2]), data.batch([7, 2, 9])
        assert mine.x.equal(theirs.x)
        assert mine.y.equal(theirs.y)
        assert mine.ids.tolist() == theirs.ids.tolist()
        assert some.labels.tolist() == y[[7, 2, 9]].tolist()
        assert (len(some), some.name, some.transform) == (3, "bands", data.transform)
        assert some.source.where(1) == data.source.where(2)
        assert some.fingerprint([0, 1, 2]) == data.fingerprint([7, 2, 9])
