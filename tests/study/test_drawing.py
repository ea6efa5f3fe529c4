from itertools import combinations, pairwise

import numpy as np
import pytest

from regrow.study.compare import METHOD_SETTINGS
from regrow.study.drawing import COLORS, MARKERS, printable, styles


def test_printable_replaces_what_cannot_be_seen_and_shortens_in_the_middle():
    assert printable("a\x00b\u202ec\ud800") == "a�b�c�"
    assert printable("größe 95\u00a0%") == "größe 95\u00a0%"
    assert printable("abcdefghij", 7) == "abc…hij"
    assert printable("abcdefg", 7) == "abcdefg"


def test_styles_differ_in_more_than_colour():
    found = styles([str(number) for number in range(48)])
    assert len({(style.color, style.marker) for style in found.values()}) == 48
    first = [found[str(number)] for number in range(7)]
    assert len({style.marker for style in first}) == 7
    assert all(one.dashes != other.dashes for one, other in pairwise(first))
    assert {style.marker for style in found.values()} == set(MARKERS)


def test_a_method_looks_the_same_wherever_it_stands():
    alone = {method: styles([method])[method] for method in METHOD_SETTINGS}
    assert styles([*METHOD_SETTINGS]) == alone
    assert styles(["x", *reversed(METHOD_SETTINGS)]).items() >= alone.items()
    assert len({style.color for style in [*alone.values()][:7]}) == 7
    assert len({(style.color, style.marker) for style in alone.values()}) == len(METHOD_SETTINGS)
    assert len({(style.color, style.dashes) for style in [*alone.values()][1:25]}) == 24
    assert [method for method, style in alone.items() if style.color == "#000000"] == ["standard"]


def test_variants_have_shades_of_their_methods_colour_whatever_else_is_there():
    names = [f"{method} {number}" for method in METHOD_SETTINGS for number in range(9)]
    places = {name: (name.split()[0], int(name.split()[1])) for name in names}
    found = styles(names, places)
    assert {name: styles([name], places)[name] for name in names} == found
    assert all(found[f"{method} 0"] == styles([method])[method] for method in METHOD_SETTINGS)
    looks = {name: (style.color, style.marker) for name, style in found.items()}
    for method in METHOD_SETTINGS:
        assert len({looks[f"{method} {number}"] for number in range(9)}) == 9
    first = [name for name in names if name.split()[0] in [*METHOD_SETTINGS][:6]]
    assert len({looks[name] for name in first}) == len(first)
    for method in METHOD_SETTINGS:
        assert len({found[f"{method} {number}"].color for number in range(3)}) == 3


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_three_variants_are_told_apart_by_the_colour_blind(method):
    found = styles(["0", "1", "2"], {str(number): (method, number) for number in range(3)})
    for matrix in VISION.values():
        lab = [seen(style.color, matrix) for style in found.values()]
        assert min(float(np.linalg.norm(one - other)) for one, other in combinations(lab, 2)) > 10


def seen(color, matrix):
    """CIE Lab of an sRGB colour as an eye sees it whose linear RGB ``matrix`` [3, 3] changes."""
    values = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
    linear = np.clip(np.array(matrix) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / to_xyz.sum(axis=1), 1e-9))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado, Oliveira and Fernandes (2009), severity 1.
VISION = {
    "all cones": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart_by_the_colour_blind(vision):
    lab = [seen(color, VISION[vision]) for color in COLORS]
    pairs = combinations(range(len(lab)), 2)
    nearest = min(float(np.linalg.norm(lab[one] - lab[other])) for one, other in pairs)
    assert nearest > 10  # a difference of 2.3 is just noticeable side by side
