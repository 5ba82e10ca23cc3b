"""The figure of retrieval results, compared with its pixels."""

from itertools import pairwise

import numpy as np
from PIL import Image

from hf_unigd.evaluation.figures import draw_retrieval


QUERY, *RESULTS = [(255, 0, 255), (0, 255, 255), (255, 255, 0), (0, 0, 255)]
FRAMES = [(44, 160, 44), (214, 39, 40), (211, 211, 211)]  # matplotlib's tab:green, tab:red and lightgrey


def test_results_stand_beside_their_query_in_frames_that_show_their_relevance(tmp_path):
    query, *images = [Image.new("RGB", (20, 20), colour) for colour in (QUERY, *RESULTS)]
    results = [(image, "A text.", relevant) for image, relevant in zip(images, (True, False, None), strict=True)]
    draw_retrieval([(query, results), ("A text query.", results[:1])], tmp_path / "retrieval.png")
    pixels = np.asarray(Image.open(tmp_path / "retrieval.png").convert("RGB"))

    def columns_of(colour):
        """Extent of a colour in the upper row of the figure."""
        columns = np.nonzero((pixels[: len(pixels) // 2] == np.array(colour)).all(-1))[1]
        return columns.min(), columns.max()

    extents = [columns_of(colour) for colour in (QUERY, *RESULTS)]
    assert all(left[1] < right[0] for left, right in pairwise(extents))
    for frame, result in zip(FRAMES, RESULTS, strict=True):
        first, last = columns_of(result)
        assert columns_of(frame)[0] <= first and last <= columns_of(frame)[1]
        others = [columns_of(other) for other in RESULTS if other != result]
        assert not any(columns_of(frame)[0] <= end <= columns_of(frame)[1] for other in others for end in other)
    lower = pixels[len(pixels) // 2 :]
    assert (lower == np.array(RESULTS[0])).all(-1).any()
    assert not any((lower == np.array(colour)).all(-1).any() for colour in (QUERY, *RESULTS[1:]))
