import argparse

import pytest
import torch

from hfgpt.adopt.checkpoint import fit, read_checkpoint


class ModelConfig:
    """Pickled below under the name of a stranger's class."""


class Danger:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self):
        return open, ("danger", "w")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "model.", "net.gpt."])
def test_whatever_was_put_before_the_names_is_taken_off(single_file, tmp_path, prefix):
    state = single_file.state_dict()

    found, notes = fit({prefix + name: each for name, each in state.items()}, single_file, tmp_path)

    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert bool(notes) == bool(prefix)


def test_masks_that_the_file_lacks_are_those_the_constructor_makes(single_file, tmp_path):
    state = single_file.state_dict()

    found, notes = fit({name: each for name, each in state.items() if "mask" not in name}, single_file, tmp_path)

    assert found.keys() == state.keys()
    assert "h.0.mask" in notes[0]


def test_one_of_two_tied_tensors_is_enough(single_file, tmp_path):
    state = single_file.state_dict()
    del state["lm_head.weight"]

    found, _ = fit(state, single_file, tmp_path)

    assert torch.equal(found["lm_head.weight"], state["wte.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("wpe.weight"), "wpe.weight: not in the file"),
        (lambda state: state.update(extra=torch.ones(1)), "extra: in the file, not in the module"),
        (lambda state: state.update({"wpe.weight": torch.ones(2, 2)}), r"wpe.weight: in the file \(2, 2\)"),
        (lambda state: state.update({"wte.weight": state["wte.weight"] + 1}), "differ, and the module ties them"),
        (lambda state: state.update({f"ema.{name}": each for name, each in state.items()}), "under '' and 'ema.'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(single_file, tmp_path, change, message):
    state = single_file.state_dict()
    change(state)

    with pytest.raises(ValueError, match=message):
        fit(state, single_file, tmp_path)


def test_weights_that_are_there_twice_are_refused(single_file, tmp_path):
    state = single_file.state_dict()
    twice = {f"{prefix}.{name}": each for prefix in ("model", "ema") for name, each in state.items()}

    with pytest.raises(ValueError, match=r"2 times, under 'ema\.' and 'model\.'"):
        fit(twice, single_file, tmp_path)


def test_the_config_beside_the_weights_is_read_as_its_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(ModelConfig, "__module__", "__main__")
    monkeypatch.setattr("__main__.ModelConfig", ModelConfig, raising=False)
    config = ModelConfig()
    config.n_layer = 3
    torch.save({"model": {"a": torch.ones(2)}, "config": config, "step": 1}, tmp_path / "one.pt")
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(n_layer=3)}, tmp_path / "two.pt")
    torch.save({"state_dict": {"a": torch.ones(2)}, "hyper_parameters": {"n_layer": 3}}, tmp_path / "three.pt")

    found = [read_checkpoint(tmp_path / f"{name}.pt", {"ModelConfig"})[1] for name in ("one", "two", "three")]

    assert found == [{"n_layer": 3}] * 3


def test_a_checkpoint_that_would_run_something_is_refused_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.ones(2)}, "config": Danger()}, "ckpt.pt")

    with pytest.raises(ValueError, match=r"it wants to run .*open.* Save it again without that object"):
        read_checkpoint(tmp_path / "ckpt.pt", {"ModelConfig"})

    assert not (tmp_path / "danger").exists()
