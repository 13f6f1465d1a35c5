import re

import numpy as np
import pytest

from llamagen.class_names import ClassNames, class_names_of, imagenet_classes, named_classes


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        (207, 207),
        (np.int64(3), 3),
        ("207", 207),
        ("golden retriever", 207),
        ("  Golden-Retriever ", 207),
        ("n02099601", 207),
        ("chesapeake", 209),
        ("tiger", 292),  # not the tiger cat, the tiger shark or the tiger beetle
        ("Tinca tinca", 0),
        ("construction crane", 517),
        ("maillot, tank suit", 639),
        ("St. Bernard", 247),
    ],
)
def test_a_class_of_imagenet_is_found(wanted: str | int, number: int) -> None:
    assert imagenet_classes().find(wanted) == number


@pytest.mark.parametrize(
    ("wanted", "listed"),
    [
        ("retriever", ("5 classes", "207 (golden retriever)", "209 (Chesapeake Bay retriever)")),
        ("crane", ("2 classes", "134 (crane, crane bird)", "517 (crane, construction crane)")),
        ("goldn retreiver", ("no class", "207 (golden retriever)")),
        ("zzzz", ("no class", "0 (tench)")),
        ("deer", ("no class",)),  # only the Scottish deerhound begins with it
        ("goldfis", ("no class", "1 (goldfish)")),
        ("-1", ("class -1 was requested",)),
        ("99%", ("no class",)),
        ("", ("no class",)),
        ("1000", ("classes 0 to 999",)),
        (-1, ("classes 0 to 999",)),
        (True, ("classes 0 to 999",)),
        (2.5, ("classes 0 to 999",)),
    ],
)
def test_an_ambiguous_or_unknown_class_is_an_error_with_near_names(wanted: str | int, listed: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        imagenet_classes().find(wanted)
    assert "\n" not in str(error.value)
    for part in listed:
        assert part in str(error.value)


def test_imagenet_has_a_thousand_classes_in_the_order_of_their_ids() -> None:
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert classes[0] == "tench"
    assert classes[999] == "toilet tissue"
    assert all(re.search("[a-z]", name) for name in classes.names)


def test_names_of_ones_own_classes() -> None:
    classes = ClassNames(["7", "three", "cats and dogs"])
    assert classes.find("7") == 0  # a name, not a number
    assert classes.find("2") == 2
    assert classes.find("dogs") == 2
    with pytest.raises(ValueError, match="2 ids"):
        ClassNames(["a"], ["b", "c"])


def test_folders_with_ids_of_imagenet_get_its_names() -> None:
    classes = named_classes(["n02099601", "n01440764"])
    assert (classes[0], classes.find("tench"), classes.find("n02099601")) == ("golden retriever", 1, 0)
    assert named_classes(["n00000001", "cat"]).names == ("n00000001", "cat")


def test_a_model_has_the_names_of_its_data_or_of_imagenet() -> None:
    own = class_names_of(["cat", "golden retriever"], 1000)  # more classes than the data
    assert own is not None
    assert (own.find("golden retriever"), own.find("cat"), own.find("999"), len(own)) == (1, 0, 999, 1000)
    assert class_names_of(None, 1000) is imagenet_classes()
    assert class_names_of(["a", "b"], 1) is None
    assert class_names_of(None, 10) is None
