"""The mutations fit the present code, so that the check of the tests can be run at any time."""

from tests.mutations import ROOT, mutations


def test_every_mutation_applies_once_and_names_tests_that_exist() -> None:
    found = mutations()
    assert len(found) >= 60
    assert len({each.name for each in found}) == len(found)
    assert sum(each.meant for each in found) >= 20
    for each in found:
        each.applied((ROOT / each.file).read_text())
        assert each.tests, each.name
        for test in each.tests:
            file, _, name = test.partition("::")
            assert name.partition("[")[0] in (ROOT / file).read_text(), f"{each.name}: {test}"
    rooms = {each.file.partition("/")[0] for each in found}
    assert rooms >= {"llamagen", "lightning_modules", "datamodules", "callbacks", "evaluation", "command_line"}
