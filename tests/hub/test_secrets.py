"""A canary token, and this machine's paths, are found in nothing that is written, said, logged or sent."""

import base64
import logging

import pytest
from hub_client import OTHER_TOKEN, TOKEN
from huggingface_hub import constants
from test_from_elsewhere import ListedTrainer, make_trainer

from hfgpt import HFGPTForCausalLM
from hfgpt.hub.pull import pull
from hfgpt.hub.push import HubError, push


def in_every_form(secret):
    """A text as it is, and within base64 at each of its three alignments."""
    plain = secret.encode()
    yield plain
    for offset in range(3):
        # The characters at either end also depend on what stands around the secret.
        yield base64.b64encode(b"x" * offset + plain)[4 if offset else 0 : -4]


def appears(secret, content):
    return any(form in content for form in in_every_form(secret))


def test_the_search_finds_what_it_looks_for():
    for lead in range(4):
        assert appears(TOKEN, base64.b64encode(b"." * lead + TOKEN.encode() + b"...."))
    assert not appears(TOKEN, base64.b64encode(OTHER_TOKEN.encode()))


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_the_token_and_the_paths_of_this_machine_are_nowhere(hub, run, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(constants, "HF_DEBUG", True)  # every request is logged as a command for curl
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx2", "httpcore2", "transformers"):
        caplog.set_level(logging.DEBUG, logger=name)
    text = (run / "run.yaml").read_text().replace("output_dir: out/demo", f"output_dir: {run}")
    (run / "run.yaml").write_text(text)
    said = []

    hub.fail("create", "status", 1, value=503)
    hub.fail("commit", "lose", 1)
    push(run, "anna/demo", log=said.append)
    hub.fail("storage-get", "flip", 1)
    pull("anna/demo", tmp_path / "copy", log=said.append)
    HFGPTForCausalLM.from_pretrained("anna/demo")
    trainer = make_trainer(ListedTrainer, run, tmp_path / "trained", hub_strategy="every_save")
    trainer.train()
    trainer.push_to_hub()
    for fault, token in (("drop", TOKEN), ("status", TOKEN), (None, OTHER_TOKEN), (None, TOKEN[:-1])):
        if fault:
            hub.fail("info", fault, 5, value=500)
        with pytest.raises((HubError, ValueError)) as failure:
            push(run, "anna/demo" if fault else "guild/none", token=token, log=said.append)
        said.append(repr(failure.value))

    requests = [
        "\n".join([seen.path, *(f"{name}: {value}" for name, value in seen.headers.items() if name != "authorization")])
        for seen in hub.seen
    ]
    written = [tmp_path / "hf home", tmp_path / "copy"]
    places = {
        "requests": "\n".join(requests).encode(),
        "bodies": b"\n".join(seen.body for seen in hub.seen),
        "repositories": b"\n".join(b"\n".join(hub.files(repo).values()) for repo in hub.repos),
        "said": "\n".join(said).encode(),
        "logs": caplog.text.encode(),
    } | {str(path): path.read_bytes() for folder in written for path in folder.rglob("*") if path.is_file()}
    assert len(places["logs"]) > 10_000
    assert len(said) >= 8
    assert [name for name, content in places.items() if appears(TOKEN, content)] == []
    assert [name for name in ("requests", "bodies", "repositories") if appears(str(run), places[name])] == []
    storage = [seen for seen in hub.seen if seen.path.startswith("/storage/")]
    assert len(storage) >= 4
    assert not [seen for seen in storage if "authorization" in seen.headers]
