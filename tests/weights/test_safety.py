"""What is damaged, mislabelled or hostile is refused in one line that names the file, whichever reader meets it."""

import json
import pickle
import random
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from foreign import Canary, from_scratch, llmc_bytes, save_nanogpt
from safetensors.torch import load_file, save_file

from hfgpt.training.checkpoint import Manifest, TrainState, save_checkpoint
from hfgpt.weights import load, save
from hfgpt.weights.convert import convert, open_source
from hfgpt.weights.formats import openai
from hfgpt.weights.model_parts import build_from


def read(source, **settings):
    _, checkpoint = open_source(source, **settings)
    model, _ = build_from(source, checkpoint)
    return model


@pytest.fixture
def make_source(make_gpt2, tmp_path):
    """A function that puts a random GPT-2 into a file or folder of a format."""

    def make(form):
        gpt2 = make_gpt2(activation_function="gelu" if form == "nanogpt" else "gelu_new")
        path = tmp_path / {"nanogpt": "ckpt.pt", "llm.c": "model.bin", "llms-from-scratch": "model.pth"}.get(form, form)
        if form == "nanogpt":
            save_nanogpt(gpt2, path)
        elif form == "llm.c":
            path.write_bytes(llmc_bytes(gpt2))
        elif form == "llms-from-scratch":
            torch.save(from_scratch(gpt2), path)
        else:
            gpt2.save_pretrained(tmp_path / "plain")
            save(load(tmp_path / "plain"), path, form)
        return path

    return make


NAMES = {  # where each format says its shape, and how it calls it
    "hfgpt": ("num_hidden_layers", "vocab_size"),
    "gpt2": ("n_layer", "vocab_size"),
    "openai": ("n_layer", "n_vocab"),
    "nanogpt": ("n_layer", "vocab_size"),
    "llm.c": (4, 3),
}


def change_setting(form, path, name, change):
    """Say something else of the shape than the tensors do; `change` gets the old value."""
    if form == "llm.c":
        content = bytearray(path.read_bytes())
        content[4 * name : 4 * name + 4] = struct.pack("<i", change(struct.unpack_from("<i", content, 4 * name)[0]))
        path.write_bytes(content)
    elif form == "nanogpt":
        content = torch.load(path)
        content["model_args"][name] = change(content["model_args"].get(name))
        torch.save(content, path)
    else:
        file = path / ("hparams.json" if form == "openai" else "config.json")
        settings = json.loads(file.read_text())
        settings[name] = change(settings.get(name))
        file.write_text(json.dumps(settings))


@pytest.mark.parametrize("form", NAMES)
def test_a_shape_that_is_not_the_tensors_is_refused(make_source, form):
    layers, vocabulary = NAMES[form]
    for name, by in ((layers, 1), (layers, -1), (layers, 2**30), (vocabulary, -1), (vocabulary, 1)):
        if form == "llm.c" and (name, by) == (vocabulary, 1):
            continue  # one more row of zeros: the padding hides it
        path = make_source(form)
        change_setting(form, path, name, lambda value, by=by: value + by)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)
        if path.is_dir():
            for folder in (path, path.parent / "plain"):
                [file.unlink() for file in folder.iterdir()]
                folder.rmdir()


@pytest.mark.parametrize("form", [form for form in NAMES if form != "llm.c"])
@pytest.mark.parametrize("value", ["2", None, 2.5, True, -1, [2], 10**20])
def test_a_number_of_layers_of_another_type_is_refused(make_source, form, value):
    path = make_source(form)
    change_setting(form, path, NAMES[form][0], lambda _: value)

    with pytest.raises(ValueError, match=re.escape(str(path))) as refused:
        read(path)

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("form", ["openai", "nanogpt"])
def test_a_setting_that_a_format_does_not_know_is_refused(make_source, form):
    path = make_source(form)
    change_setting(form, path, "n_kv_head", lambda _: 2)

    with pytest.raises(ValueError, match="n_kv_head"):
        read(path)


def test_a_setting_that_a_config_ignores_is_noted(make_source, tmp_path):
    path = make_source("gpt2")
    change_setting("gpt2", path, "rope_theta", lambda _: 10000)

    assert convert(path, tmp_path / "out", "hfgpt").notes == [
        "config.json: ignored what hfgpt does not know: rope_theta."
    ]


@pytest.mark.parametrize("form", ["hfgpt", "gpt2"])
@pytest.mark.parametrize("content", ["", '{"n_layer":', "[]", "null"])
def test_settings_that_are_no_json_object_are_refused(make_source, form, content):
    path = make_source(form)
    for name in ("generation_config.json", "config.json"):
        (path / name).write_text(content if content != "null" or name == "config.json" else "{")
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)


def test_a_changed_file_of_a_checkpoint_is_seen_by_its_manifest(make_source, tmp_path):
    model = load(make_source("hfgpt"))
    checkpoint = save_checkpoint(tmp_path / "run", Manifest(TrainState(step=1), {}), model.save_pretrained, {}, 1)
    convert(checkpoint, tmp_path / "out", "hfgpt")
    config, weights = checkpoint / "config.json", checkpoint / "model.safetensors"
    intact = config.read_bytes(), weights.read_bytes()

    for file, damaged in (
        (config, intact[0].replace(b'"num_attention_heads": 4', b'"num_attention_heads": 8')),  # fits the tensors too
        (weights, intact[1][:-1] + bytes([intact[1][-1] ^ 1])),
    ):
        before = file.read_bytes()
        assert damaged != before
        file.write_bytes(damaged)
        for way in (read, load):
            with pytest.raises(ValueError, match=rf"{file.name} is damaged: it is not what was written"):
                way(checkpoint)
        file.write_bytes(before)
    load(checkpoint)
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        read(checkpoint)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
@pytest.mark.parametrize("by", ["torch", "old torch", "pickle"])
def test_a_malicious_pickle_in_a_folder_is_refused_and_not_run(make_source, tmp_path, name, by):
    path = make_source("gpt2")
    (path / "model.safetensors").unlink()
    content = {"transformer.wte.weight": Canary(tmp_path / "sang")}
    if by == "pickle":
        (path / name).write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path / name, _use_new_zipfile_serialization=by == "torch")
    if "00001" in name:
        index = {"weight_map": {"transformer.wte.weight": name}}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    for way in (read, load):
        with pytest.raises(ValueError, match=rf"{name}: not opened"):
            way(path)

    assert not (tmp_path / "sang").exists()


def rewrite(file, change, compression=zipfile.ZIP_STORED):
    """Write an archive again, with checksums that fit; `change` gets each record's name and content."""
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


ARCHIVES = {
    # A hundred megabytes of nothing in a hundred kilobytes; and its tensors could not be read where they lie.
    "compressed": (
        lambda name, content: content + bytes(10**8) if name.endswith("data.pkl") else content,
        zipfile.ZIP_DEFLATED,
        "a compressed archive",
    ),
    # torch 2.13 is ended by a segmentation fault when it reads this in its fake-tensor mode.
    "big-endian": (
        lambda name, content: b"big" if name.endswith("byteorder") else content,
        zipfile.ZIP_STORED,
        "big-endian",
    ),
    # The rest of the tensor would be read from the record behind it.
    "a record cut short": (
        lambda name, content: content[:-4] if name.endswith("/data/0") else content,
        zipfile.ZIP_STORED,
        "damaged or no file of torch.save's",
    ),
}


@pytest.mark.parametrize("fault", ARCHIVES)
@pytest.mark.parametrize("form", ["nanogpt", "llms-from-scratch"])
def test_an_archive_that_torch_does_not_write_is_refused(make_source, form, fault):
    path = make_source(form)
    change, compression, message = ARCHIVES[fault]
    rewrite(path, change, compression)

    with pytest.raises(ValueError, match=rf"{path.name}: {message}"):
        read(path)


def test_an_archive_written_again_is_read(make_source):
    path = make_source("nanogpt")
    before = read(path).state_dict()

    rewrite(path, lambda name, content: content)

    assert all(torch.equal(before[name], each) for name, each in read(path).state_dict().items())


# torch says of sparse tensors that it checks them (2.15), or that it does not (2.11), before hfgpt refuses them.
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: torch.ones(2)}, "3: a LazyTensor, where named tensors were to be expected"),
        ({"step": 7}, "'step': a int, where named tensors were to be expected"),
        # torch 2.15 refuses it itself, in its own words.
        ({"transformer.wpe.weight": torch.eye(64, 32).to_sparse()}, "a tensor that is sparse|not allocated yet"),
        ({"transformer.wpe.weight": torch.ones(64, 32, dtype=torch.complex64)}, "wpe.weight: holds torch.complex64"),
        ({"transformer.wpe.weight": torch.ones(64, 32).to(torch.float8_e4m3fn)}, "wpe.weight: holds torch.float8"),
        ({"transformer.wpe.weight": torch.ones(64, 32, dtype=torch.int8)}, "wpe.weight: holds torch.int8"),
        ({"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}, r"h\.0\.attn\.bias: no causal mask"),
        ({"transformer.h.0.attn.bias": torch.ones(64, 32)}, r"h\.0\.attn\.bias: no causal mask"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(make_source, change, message):
    path = make_source("nanogpt")
    content = torch.load(path)
    torch.save({**content, "model": content["model"] | change}, path)

    with pytest.raises(ValueError, match=rf"ckpt\.pt: .*{message}"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [
        {"model": 3},
        {"model_state_dict": None},
        {"model": {"transformer.wte.weight": torch.ones(320, 32)}, "model_args": [1]},
        {"model": {"transformer.wte.weight": torch.ones(320, 32)}, "config": None},
        {3: torch.ones(2)},
    ],
)
def test_dictionaries_of_another_make_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")

    with pytest.raises(ValueError, match=r"model\.pt: "):
        read(tmp_path / "model.pt")


def test_a_tensor_in_two_shards_is_refused(make_source):
    path = make_source("gpt2")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_file(tensors, path / "a.safetensors")
    save_file({"transformer.ln_f.bias": torch.ones(32)}, path / "b.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors") | {"transformer.ln_f.bias": "b.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ValueError, match=r"b\.safetensors: transformer\.ln_f\.bias is in another shard too"):
        read(path)


def test_links_are_followed_to_weights_and_to_nothing_else(make_source, tmp_path):
    path = make_source("gpt2")
    blob = (path / "model.safetensors").rename(tmp_path / "blob")
    (path / "model.safetensors").symlink_to(blob)  # as in the Hub's cache
    read(path)
    blob.write_text("root:x:0:0:secret")

    with pytest.raises(ValueError, match=r"model\.safetensors: ") as refused:
        read(path)

    assert "secret" not in str(refused.value)


def test_a_link_that_leads_nowhere_is_not_written_over(make_source, tmp_path):
    (tmp_path / "mine").symlink_to("nowhere")

    for form in ("hfgpt", "llm.c"):
        with pytest.raises(FileExistsError, match="mine exists"):
            convert(make_source("llms-from-scratch"), tmp_path / "mine", form, heads=4)

    assert (tmp_path / "mine").is_symlink()


def test_what_is_put_there_meanwhile_is_not_written_over(make_source, tmp_path, monkeypatch):
    path = make_source("gpt2")
    monkeypatch.setattr(
        "hfgpt.system.storage.make_readable", lambda staged: (tmp_path / "model.bin").write_text("mine")
    )

    with pytest.raises(FileExistsError, match=r"model\.bin exists"):
        convert(path, tmp_path / "model.bin", "llm.c")

    assert (tmp_path / "model.bin").read_text() == "mine"


@pytest.mark.parametrize("name", ["ckpt.pt", "model.gguf", "some/where/model", "../model"])
def test_what_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)

    for way in (read, load):
        with pytest.raises(ValueError, match=f"^{re.escape(name)}: no such file"):
            way(name)


@pytest.mark.parametrize("form", ["gpt2", "hfgpt"])
def test_the_weights_of_a_folder_alone_lead_to_the_folder(make_source, form):
    with pytest.raises(ValueError, match=r"model\.safetensors: one of transformers' files\. Give its folder"):
        read(make_source(form) / "model.safetensors")


def test_a_file_of_llmc_is_known_by_its_content(make_source, tmp_path):
    path = make_source("llm.c").rename(tmp_path / "model.pt")

    assert open_source(path)[0] == "llm.c"


@pytest.mark.parametrize(
    ("number", "value", "message"),
    [
        (1, 2, "of several data files"),
        (2, 1, "big-endian"),
    ],
)
def test_a_tensorflow_checkpoint_of_another_kind_is_refused(make_source, number, value, message):
    path = make_source("openai")
    entries = dict(openai.table_entries(path / openai.INDEX))
    entries[b""] = openai.field_of(1, 1) + openai.field_of(number, value)
    (path / openai.INDEX).write_bytes(openai.sorted_table(list(entries.items())))

    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_tensorflow_variable_in_parts_is_refused(make_source):
    path = make_source("openai")
    entries = dict(openai.table_entries(path / openai.INDEX))
    entries[b"model/wpe"] += openai.field_of(openai.PARTS, b"")
    (path / openai.INDEX).write_bytes(openai.sorted_table(list(entries.items())))

    with pytest.raises(ValueError, match="model/wpe is in parts"):
        read(path)


def test_numbers_that_no_tensorflow_variable_claims_are_refused(make_source):
    path = make_source("openai")
    with (path / openai.DATA).open("ab") as stream:
        stream.write(bytes(4))

    with pytest.raises(ValueError, match="by the index it should have"):
        read(path)


@pytest.mark.parametrize("vocabulary", ["{", "[3]", '{"a": "b"}'])
def test_a_damaged_vocabulary_of_openais_is_refused(make_source, tmp_path, vocabulary):
    path = make_source("openai")
    (path / openai.VOCABULARY).write_text(vocabulary)
    (path / openai.MERGES).write_text("#version: 0.2\n")

    with pytest.raises(ValueError, match=r"encoder\.json and vocab\.bpe: no byte-level BPE"):
        convert(path, tmp_path / "out", "hfgpt")


def mutated(content, draws):
    """Some bytes changed, taken out or put in."""
    result = bytearray(content)
    for _ in range(draws.choice((1, 1, 2, 5))):
        place, kind = draws.randrange(len(result)), draws.random()
        if kind < 0.6:
            result[place] = draws.randrange(256)
        elif kind < 0.8:
            del result[place : place + draws.randrange(1, 9)]
        else:
            result[place:place] = draws.randbytes(draws.randrange(1, 9))
    return bytes(result)


def mutate_start(file, draws, length):
    content = file.read_bytes()
    file.write_bytes(mutated(content[:length], draws) + content[length:])


def mutate_index(folder, draws):
    """Change an entry, with checksums that fit."""
    entries = list(openai.table_entries(folder / openai.INDEX))
    place = draws.randrange(len(entries))
    entries[place] = entries[place][0], mutated(entries[place][1], draws)
    (folder / openai.INDEX).write_bytes(openai.sorted_table(entries))


MUTATIONS = {
    "nanogpt": lambda path, draws: rewrite(
        path, lambda name, content: mutated(content, draws) if name.endswith("data.pkl") else content
    ),
    "llm.c": lambda path, draws: mutate_start(path, draws, 40),
    "openai": mutate_index,
    "gpt2": lambda path, draws: mutate_start(path / "model.safetensors", draws, 3000),
    "hfgpt": lambda path, draws: mutate_start(path / "config.json", draws, 2000),
}


@pytest.mark.parametrize("form", MUTATIONS)
def test_whatever_is_changed_is_read_or_refused_in_one_line(make_source, form):
    path = make_source(form)
    files = {file: file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())}
    answers = []
    for seed in range(25):
        MUTATIONS[form](path, random.Random(seed))
        answers.append(answer_of(path))
        for file, content in files.items():
            file.write_bytes(content)
    refusals = [answer for answer in answers if answer]
    assert len(refusals) > 15
    assert all(str(path) in refusal and "\n" not in refusal for refusal in refusals)


def answer_of(path):
    """What reading says against a source, if anything."""
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return ""


def test_an_old_pickle_of_strange_bytes_is_refused(tmp_path):
    for seed in range(20):
        (tmp_path / "model.pt").write_bytes(b"\x80\x02" + np.random.default_rng(seed).bytes(200))
        with pytest.raises(ValueError, match=r"model\.pt: "):
            read(tmp_path / "model.pt")
