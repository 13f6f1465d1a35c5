"""The table of published models."""

from llamagen.hub.published import PUBLISHED


def test_the_table_is_complete_and_consistent() -> None:
    assert len(PUBLISHED) == 12
    for name, model in PUBLISHED.items():
        assert (model.name, model.file) == (name, f"{name}.pt")
        assert (model.tokenizer is None) == (model.kind == "tokenizer")
        if model.tokenizer is not None:
            tokenizer = PUBLISHED[model.tokenizer]
            assert (tokenizer.kind, tokenizer.repository) == ("tokenizer", model.repository)
            assert name.endswith(f"_{model.resolution}")
            assert f"_{model.size}_" in name


def test_class_models_have_the_papers_guidance_and_fid() -> None:
    found = {name: (model.guidance, model.fid) for name, model in PUBLISHED.items() if model.kind == "class"}
    assert found == {
        "c2i_B_256": (2.0, 5.46),
        "c2i_B_384": (2.0, 6.09),
        "c2i_L_256": (1.75, 3.80),
        "c2i_L_384": (2.0, 3.07),
        "c2i_XL_384": (1.75, 2.62),
        "c2i_XXL_384": (1.75, 2.34),
        "c2i_3B_384": (1.65, 2.18),
    }
