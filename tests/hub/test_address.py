"""Published names, hf:// addresses and local paths are told apart."""

from pathlib import Path

import pytest

from llamagen.hub.address import Address, file_address, is_remote, repository_address


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://owner/name/model.pt", ("owner/name", "model.pt", "main")),
        ("hf://owner/my-name.v2/a/b c.pt@v1.0", None),
        ("hf://owner/my-name.v2/a/b.pt@v1.0", ("owner/my-name.v2", "a/b.pt", "v1.0")),
        ("hf://owner/name/model.pt@refs/pr/1", ("owner/name", "model.pt", "refs/pr/1")),
        (Path("hf://owner/name/model.pt@main"), ("owner/name", "model.pt", "main")),
        ("c2i_B_256", ("FoundationVision/LlamaGen", "c2i_B_256.pt", "main")),
        (Path("t2i_XL_stage2_512"), ("peizesun/llamagen_t2i", "t2i_XL_stage2_512.pt", "main")),
        ("hf://a/b", None),
        ("hf://a/b@main", None),
        ("hf://a/b/../c.pt", None),
        ("hf://a/b/c.pt@", None),
        ("hf://", None),
    ],
)
def test_an_address_of_a_file(source: str | Path, expected: tuple[str, str, str] | None) -> None:
    assert is_remote(source)
    if expected is None:
        with pytest.raises(ValueError, match=r"does not name a file on the hub; give hf://owner/repository/file\[@rev"):
            file_address(source)
        return
    address = file_address(source)
    assert address is not None
    assert (address.repository, address.file, address.revision) == expected
    assert address.given == str(source).replace("hf:/o", "hf://o")


@pytest.mark.parametrize("source", ["runs/last.ckpt", "model.pt", "/a/c2i_B_256", "s3://bucket/x.pt", "best", None, 7])
def test_a_path_is_not_on_the_hub(source: object) -> None:
    assert not is_remote(source)
    assert not isinstance(source, str) or file_address(source) is None


def test_a_local_path_wins_over_a_published_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_remote("c2i_B_256")
    Path("c2i_B_256").mkdir()
    assert not is_remote("c2i_B_256")
    assert file_address("c2i_B_256") is None


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("c2i_Q_256", "c2i_B_256"),
        ("c2i_L_384.pt", "c2i_L_384"),
        ("vq_ds16", "vq_ds16_c2i"),
        ("C2I_XXL_384", "c2i_XXL_384"),
    ],
)
def test_a_mistyped_name_lists_near_names(
    name: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=rf"^{name} is neither a file nor a published name; give .*such as .*\b{near}\b"
    ):
        file_address(name)
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    assert file_address(name) is None


@pytest.mark.parametrize("given", ["owner/name@v1", "hf://owner/name@v1"])
def test_an_address_of_a_repository(given: str) -> None:
    assert repository_address(given) == Address("owner/name", "", "v1", given)


@pytest.mark.parametrize("given", ["name", "owner/name/file.pt", "hf://owner", "../name", "owner/na me"])
def test_a_wrong_address_of_a_repository_shows_the_form(given: str) -> None:
    with pytest.raises(ValueError, match=r"is not a repository of the hub; give owner/repository\[@revision\]"):
        repository_address(given)
