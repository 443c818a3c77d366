"""TensorFlow GPT-2s as others have fine-tuned them: gpt-2-simple's folders and their like, named by `checkpoint`."""

import shutil

import numpy as np
import pytest
import torch

from hfgpt.cli import app
from hfgpt.weights import load
from hfgpt.weights.convert import convert
from hfgpt.weights.formats.openai import DATA, HPARAMS, INDEX
from hfgpt.weights.formats.tensorflow_table import checksum, field_of, sorted_table, table_entries

SLOTS = ["model/wte/Adam", "model/wte/Adam_1", "model/h1/attn/c_attn/w/Adam", "model/ln_f/b/Momentum"]
OTHERS = ["beta1_power", "train/beta2_power_1", "global_step", "Variable_12", "training/model/wpe/RMSProp_1"]


@pytest.fixture
def gpt2(make_gpt2):
    return make_gpt2()


@pytest.fixture
def openai(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path / "gpt2")
    convert(tmp_path / "gpt2", tmp_path / "openai", "openai")
    return tmp_path / "openai"


def call_it(folder, name, written="{}"):
    """Name a checkpoint's files as a fine-tuning program does."""
    for suffix in ("index", "data-00000-of-00001"):
        (folder / f"model.ckpt.{suffix}").rename(folder / f"{name}.{suffix}")
    path = written.format(name)
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\nall_model_checkpoint_paths: "{path}"\n')
    (folder / "counter").write_text("2000\n")


def with_variables(folder, names, dtype=1):
    """Add variables to a checkpoint, 8 bytes each."""
    entries = dict(table_entries(folder / INDEX))
    with (folder / DATA).open("ab") as stream:
        for name in names:
            content = np.array([0.9, 0.5], dtype="<f4").tobytes()
            place = field_of(1, dtype) + field_of(2, field_of(2, field_of(1, 2))) + field_of(4, stream.tell())
            place += field_of(5, 8) + bytes([6 << 3 | 5]) + checksum(content).to_bytes(4, "little")
            entries[name.encode()] = place
            stream.write(content)
    (folder / INDEX).write_bytes(sorted_table(sorted(entries.items())))


def assert_is(gpt2, source, **settings):
    ids = torch.arange(60).view(3, 20)
    torch.testing.assert_close(load(source, **settings)(ids).logits, gpt2(ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("model-2000", "{}"),
        ("model-0", "checkpoint/run1/{}"),
        ("model-1000", "/content/drive/My Drive/run1/{}"),
        ("model.ckpt-300", r"C:\\runs\\{}"),
        ("model.ckpt", "{}"),
        ("gpt2", "./{}"),
    ],
)
def test_a_fine_tuned_checkpoint_is_read_by_the_name_in_its_first_line(gpt2, openai, tmp_path, name, written):
    call_it(openai, name, written)

    assert_is(gpt2, openai)
    assert convert(openai, tmp_path / "out", "gpt2", strict=True, verify=True).comparison.passed


def test_the_first_line_chooses_among_several(gpt2, openai, make_gpt2, tmp_path):
    call_it(openai, "model-1000")
    other = make_gpt2()
    for parameter in other.parameters():
        parameter.data *= 1.5
    other.save_pretrained(tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "later", "openai")
    call_it(tmp_path / "later", "model-2000")
    for file in (tmp_path / "later").glob("model-2000*"):
        shutil.copy(file, openai)

    assert_is(gpt2, openai)
    (openai / "checkpoint").write_text(
        'model_checkpoint_path: "model-2000"\n'
        'all_model_checkpoint_paths: "model-1000"\nall_model_checkpoint_paths: "model-2000"\n'
    )
    assert_is(other, openai)
    (openai / "checkpoint").unlink()
    with pytest.raises(ValueError, match=r"checkpoint is missing, and there are model-1000, model-2000: which one"):
        load(openai)


def test_a_single_checkpoint_needs_no_file_that_names_it(gpt2, openai):
    call_it(openai, "model-1000")
    (openai / "checkpoint").unlink()

    assert_is(gpt2, openai)


@pytest.mark.parametrize("names", [SLOTS, OTHERS, SLOTS + OTHERS, ["global_step"]], ids=len)
def test_what_an_optimizer_keeps_is_dropped_and_said(gpt2, openai, tmp_path, capsys, names):
    with_variables(openai, names, dtype=9 if names == ["global_step"] else 1)  # 9 is int64
    call_it(openai, "model-2000")

    app(["convert", str(openai), str(tmp_path / "out"), "--to", "hfgpt", "--verify"], standalone_mode=False)

    written = capsys.readouterr().out
    assert f"note: dropped {len(names)} variables of the optimizer, such as {min(names)}." in written
    assert "(verified: " in written
    assert f"; {len(names)} filled, cut, dropped, rounded or exchanged" in written
    assert_is(gpt2, tmp_path / "out")
    with pytest.raises(ValueError, match=r"--strict: \S+ would be dropped: the optimizer's"):
        convert(openai, tmp_path / "strict", "hfgpt", strict=True)


@pytest.mark.parametrize("name", ["model/wte/ExponentialMovingAverage", "model/gate", "adapter/w", "model/h0/x"])
def test_variables_that_are_no_optimizers_are_refused_by_name(openai, name):
    with_variables(openai, [name])

    with pytest.raises(ValueError, match=f"{name}: left over"):
        load(openai)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('model_checkpoint_path: "model-3000"\n', r"names model-3000, and there is model-2000\. Correct its"),
        ('model_checkpoint_path: "../model-3000"\n', r"names model-3000, and there is model-2000"),
        ('all_model_checkpoint_paths: "model-2000"\n', "its first line names no `model_checkpoint_path`"),
        ("", "its first line names no `model_checkpoint_path`"),
    ],
)
def test_a_file_that_names_no_checkpoint_is_refused(openai, content, message):
    call_it(openai, "model-2000")
    (openai / "checkpoint").write_text(content)

    with pytest.raises(ValueError, match=rf"checkpoint:? {message}"):
        load(openai)


def test_a_folder_without_its_shape_says_where_that_is(openai):
    call_it(openai, "model-2000")
    (openai / HPARAMS).unlink()

    with pytest.raises(ValueError, match=r"hparams\.json is missing\. Copy it from the model that was fine-tuned"):
        load(openai)
