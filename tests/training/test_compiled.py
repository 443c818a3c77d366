"""A compiled run: its steps are those of eager code, and one that is not does not begin."""

import pytest
import torch
from functorch.compile import make_boxed_func
from runs import DROPOUT, LOOPS, assert_same_path, assert_same_run, run, run_to_step, training_lines
from torch._dynamo.backends.common import aot_autograd

from hfgpt.config.loading import load_config
from hfgpt.training.checkpoint import checkpoints, load_manifest
from hfgpt.training.startup_checks import COMPILE_FROM, eager_seconds

WITH_DROPOUT = [f"model.{name}={value}" for name, value in DROPOUT.items()]
SHORT = ["train.epochs=null", "train.max_steps=3", "train.compile=true", "sample.max_new_tokens=0"]
TWO = ["train.gradient_accumulation_steps=2"]


@pytest.fixture
def compile_with(monkeypatch):
    """A function that lets torch.compile use another backend than inductor, which takes a minute a run."""
    torch._dynamo.reset()
    real = torch.compile

    def choose(backend):
        def replaced(model=None, **settings):
            return real(model, **{**settings, "backend": backend})

        monkeypatch.setattr(torch, "compile", replaced)

    yield choose
    torch._dynamo.reset()


@pytest.fixture
def counted(compile_with):
    """The graphs that a run has compiled, forward and backward, each with its number of operations."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    compile_with(aot_autograd(fw_compiler=keep))
    return graphs


@pytest.fixture
def blind(monkeypatch):
    """A function that lets both loops train without looking first."""

    def blind():
        torch._dynamo.reset()
        monkeypatch.setattr("hfgpt.training.control.check_compiled", lambda *_: None)

    return blind


def change_gradients(change):
    """A backend whose backward pass is wrong."""

    def compile_backward(graph, inputs):
        return make_boxed_func(lambda *args: [each if each is None else change(each) for each in graph.forward(*args)])

    def compile_forward(graph, inputs):
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compile_forward, bw_compiler=compile_backward)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_begins_once_its_first_step_is_the_eager_one(recipe, compile_with, capsys, loop, precision):
    compile_with("aot_eager")
    overrides = [f"loop={loop}", f"train.precision={precision}", *TWO, *WITH_DROPOUT]

    folder = run(recipe, "out", *SHORT, *overrides)

    assert "the compiled step is the eager one: gradient norm " in capsys.readouterr().err
    assert training_lines(folder)[0]["grad_norm"] > 0


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("change", [torch.zeros_like, lambda each: each * 1.05], ids=["no gradient", "5 % too large"])
def test_a_compiled_step_that_is_another_ends_the_run_before_anything_is_trained(recipe, compile_with, loop, change):
    compile_with(change_gradients(change))

    with pytest.raises(ValueError, match=r"`train\.compile` computes another step than eager code") as caught:
        run(recipe, "out", *SHORT, f"loop={loop}", *WITH_DROPOUT)

    assert f"(torch {torch.__version__}, fp32, cpu): gradient norm " in str(caught.value)
    assert "Set `train.compile=false`" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not training_lines(recipe.parent / "out")
    assert not checkpoints(recipe.parent / "out")


def test_a_run_that_may_choose_does_not_compile_on_a_cpu_and_says_so(recipe, counted, capsys):
    folder = run(recipe, "out", *SHORT, "train.compile=auto")

    assert "`train.compile=auto`: not compiled (that takes a CUDA GPU)" in capsys.readouterr().err
    assert not counted
    assert "compile: auto" in (folder / "run.yaml").read_text()
    assert not load_manifest(checkpoints(folder)[-1]).is_compiled


@pytest.mark.parametrize(("steps", "pays"), [(2000, False), (5000, True)])
def test_compiling_pays_where_it_saves_more_than_it_takes(steps, pays):
    # An H100: 700 TFLOP/s of products; GPT-2's 124M, 32 rows of 1,024 tokens; 40 s to compile, 17 ms saved a step.
    flops = steps * 32 * 1024 * (6 * 124_000_000 + 12 * 12 * 768 * 1024)

    assert (eager_seconds(flops, peak=700e12) >= COMPILE_FROM) == pays == (steps * 0.017 > 40)


def test_what_is_neither_true_nor_false_nor_auto_is_refused(recipe):
    with pytest.raises(ValueError, match=r"`train.compile` must be true, false or 'auto', got 'atuo'"):
        load_config(recipe, ["train.compile=atuo"])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loop", LOOPS)
def test_looking_changes_no_step(recipe, compile_with, blind, loop, backend):
    compile_with(backend)
    overrides = [*SHORT, f"loop={loop}", *TWO, *WITH_DROPOUT]
    looked = run(recipe, "looked", *overrides)

    blind()

    assert_same_run(looked, run(recipe, "blind", *overrides))


@pytest.mark.parametrize("loop", LOOPS)
def test_without_dropout_nothing_is_compiled_twice_for_the_look(recipe, counted, blind, loop):
    run(recipe, "looked", *SHORT, f"loop={loop}")
    looked = list(counted)

    blind()
    counted.clear()
    run(recipe, "blind", *SHORT, f"loop={loop}")

    assert looked == counted
    assert looked


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_that_goes_on_is_looked_at_again(recipe, compile_with, monkeypatch, loop):
    compile_with("aot_eager")
    run_to_step(recipe, "out", 1, *SHORT, f"loop={loop}")
    torch._dynamo.reset()
    compile_with(change_gradients(torch.zeros_like))

    with pytest.raises(ValueError, match=r"`train\.compile` computes another step than eager code"):
        run(recipe, "out", *SHORT, f"loop={loop}", resume=True)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_without_gradients_says_that_compiling_may_be_why(recipe, compile_with, blind, loop):
    compile_with(change_gradients(torch.zeros_like))
    blind()

    with pytest.raises(FloatingPointError, match=r"0 at step 3, .* compiles without gradients \(try `train\.compile=f"):
        run(recipe, "out", *SHORT, f"loop={loop}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "precision"), [("ddp", "fp32"), ("ddp", "bf16"), ("zero1", "fp32"), ("zero2", "bf16")]
)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_compiled_step_is_looked_at_on_every_process(recipe, launch, engine, precision, loop):
    steps = ["train.epochs=null", "train.max_steps=3", f"loop={loop}", f"train.precision={precision}", *TWO]
    one = run(recipe, "one", "train.batch_size=8", *steps)

    process = launch("two", "train.compile=true", *steps, engine=engine)

    log = recipe.parent / "two.log"
    assert process.wait(timeout=500) == 0, log.read_text()[-3000:]
    assert "the compiled step is the eager one: gradient norm " in log.read_text()
    assert_same_path(recipe.parent / "two", one, bound={"fp32": 1e-5, "bf16": 5e-3}[precision])
