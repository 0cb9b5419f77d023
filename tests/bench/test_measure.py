"""The cases of the benchmark, their forms and their measurement, at toy sizes."""

import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from official import SMALL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from toy import TOY

from minimti.bench import cases as cases_module
from minimti.bench.cases import (
    DECODE,
    DENOISE,
    ENCODE,
    SAMPLE,
    TRAIN,
    Case,
    Step,
    build,
    cpu_cases,
    inputs,
    start,
    timed_cases,
)
from minimti.bench.cost import Cost
from minimti.bench.measure import alone, by_turns, encoding_per_step, estimate, summarise
from minimti.bench.reference import REPEATED_BLOCKS, Diffusers
from minimti.budget import Budget
from minimti.invert import make_recipe
from minimti.networks import fused
from minimti.networks.recompute import Checkpointed
from minimti.svd import SVD

pytest.importorskip("diffusers")

CASE = Case(TRAIN, TOY, torch.float32)
STEPS = pytest.mark.parametrize("step", [TRAIN, DENOISE, ENCODE, DECODE], ids=lambda step: step.prepare.__name__)


# ---------------------------------------------------------------------------------------------- cases


@STEPS
def test_both_libraries_compute_the_same(step):
    """Up to another epsilon in diffusers' norms."""
    unet = replace(SMALL.unet, channel_mult=(1, 2, 2), attention_resolutions=(2, 1))
    config = replace(TOY, unet=unet, vae=replace(SMALL.vae, ch_mult=(1, 2)))
    case = Case(step, config, torch.float32)
    tensors = inputs(case, "cpu")
    results = []
    for library in (SVD, Diffusers):
        torch.manual_seed(1)  # the noise of a training step
        results.append(step.run(build(library, case, "cpu"), *tensors))
    ours, theirs = results
    assert ours.shape == theirs.shape
    assert ours.norm() > 0
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@STEPS
def test_a_step_can_be_repeated_and_takes_nothing_from_the_cpu(step, monkeypatch):
    """A CUDA graph records it: a copy from the CPU or a look at a value would break the recording."""
    case = Case(step, TOY, torch.float32)
    run = start(build(SVD, case, "cpu"), case, "eager", inputs(case, "cpu"))
    for name in ("tensor", "linspace", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *_, name=name, **__: pytest.fail(f"torch.{name} in the step"))
    for name in ("new_tensor", "item", "tolist", "cpu", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(f"Tensor.{name} in the step"))
    first, second = run(), run()
    monkeypatch.undo()
    assert torch.equal(first, second)


@pytest.mark.parametrize("step", [TRAIN, DECODE, SAMPLE], ids=lambda step: step.prepare.__name__)
def test_a_model_holds_only_the_networks_that_its_step_uses(step):
    case = replace(CASE, step=step, dtype=torch.bfloat16)
    ours = {name.partition(".")[0]: weight.dtype for name, weight in build(SVD, case, "cpu").named_parameters()}
    dtypes = {"unet": torch.bfloat16, "vae": torch.float32, "image_encoder": torch.bfloat16}
    assert ours == {name: dtypes[name] for name in step.networks}
    theirs = build(Diffusers, case, "cpu")
    assert {name for name, _ in theirs.named_children()} == set(step.networks) - {"image_encoder"}


def test_each_library_recomputes_as_the_case_says():
    case = replace(CASE, budget=Budget(memory="low"), checkpointing=True)
    modes = {module.mode for module in build(SVD, case, "cpu").modules() if isinstance(module, Checkpointed)}
    assert modes == {"low"}
    assert build(Diffusers, case, "cpu").unet.is_gradient_checkpointing
    assert not build(Diffusers, CASE, "cpu").unet.is_gradient_checkpointing


def test_weights_are_equal_and_each_library_has_its_own_memory_format():
    ours, theirs = (build(library, CASE, "cpu").unet.conv_in.weight for library in (SVD, Diffusers))
    assert (ours == theirs).all()
    assert ours.is_contiguous(memory_format=torch.channels_last) and theirs.is_contiguous()


def test_a_cpu_runs_the_same_steps_in_both_precisions():
    fp32 = ["tiny_train_fp32", "tiny_train_compiled_fp32", "train_fp32", "denoise_fp32"]
    assert list(cpu_cases(SMALL)) == fp32 + [name.replace("fp32", "bf16") for name in fp32]
    assert all(
        case.dtype == (torch.bfloat16 if "bf16" in name else torch.float32)
        for name, (case, _) in cpu_cases(SMALL).items()
    )


def test_a_gpu_times_every_mode_and_fp16_but_no_step_that_releases_networks():
    cases = timed_cases(TOY)
    assert {"train_fast", "train_balanced", "train_low", "denoise", "encode", "decode"} <= cases.keys()
    assert all(case.step is not SAMPLE for case in cases.values())
    assert cases["denoise_fp16"].dtype == cases["decode_fp16"].vae_dtype == torch.float16


# ---------------------------------------------------------------------------------------------- forms


def test_forms_of_a_step():
    train = timed_cases(TOY)["train_max"].forms
    assert train == {"ours": ("graph", "eager", "compiled"), "diffusers": ("eager", "channels_last", "compiled")}
    assert timed_cases(TOY)["train_low"].forms.keys() == {"ours"}
    assert timed_cases(TOY)["decode"].forms == {"ours": ("eager",), "diffusers": ("eager", "channels_last")}


@pytest.mark.parametrize("form", ["eager", "channels_last", "compiled"])
def test_diffusers_as_it_comes_and_as_it_advises(form, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append((type(module), options)))
    model = build(Diffusers, CASE, "cpu")
    before = CASE.step.prepare(model, *inputs(CASE, "cpu"))().shape
    assert start(model, CASE, form, inputs(CASE, "cpu"))().shape == before
    flat = [weight for weight in model.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
    assert flat and all(w.is_contiguous(memory_format=torch.channels_last) == (form != "eager") for w in flat)
    if form == "compiled":
        assert {kind.__name__ for kind, _ in compiled} == set(REPEATED_BLOCKS)
        assert all(options == {"fullgraph": True} for _, options in compiled)
    else:
        assert not compiled


def test_ours_is_compiled_as_the_programs_compile_it(monkeypatch):
    taken = []
    monkeypatch.setattr(cases_module, "compile_unet", taken.append)
    model = build(SVD, CASE, "cpu")
    for form in ("eager", "compiled"):
        start(model, CASE, form, inputs(CASE, "cpu"))
    assert taken == [model.unet]


@pytest.mark.parametrize("library, form", [(SVD, "channels_last"), (Diffusers, "graph"), (SVD, "fast")])
def test_a_form_that_a_library_does_not_have(library, form):
    with pytest.raises(ValueError, match=f"{library.__name__} has no form '{form}'"):
        start(build(library, CASE, "cpu"), CASE, form, inputs(CASE, "cpu"))


def test_a_graph_is_recorded_after_two_runs_on_a_side_stream_and_then_replayed(monkeypatch):
    """The order of calls, on a stand-in for a GPU that holds 200 bytes, and 900 at the peak of a step."""
    calls = []

    @contextmanager
    def block(name):
        calls.append(f"{name} begins")
        yield
        calls.append(f"{name} ends")

    def stream():
        return SimpleNamespace(wait_stream=lambda other: calls.append("wait"))

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: block("side"))
    monkeypatch.setattr(torch.cuda, "graph", lambda _: block("record"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: calls.append("replay")))
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 900)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 200)
    result, model = torch.ones(1), build(SVD, CASE, "cpu")
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: calls.append(f"{size} of {dtype} on {device}"))

    def step():
        calls.append("step")
        return result

    run = start(model, replace(CASE, step=Step(lambda _: step, (), ())), "graph", [])
    warm_up = ["wait", "reset_peak_memory_stats", "side begins", "step", "step", "side ends", "wait"]
    block_of_the_peak = "700 of torch.uint8 on cuda"
    recording = ["synchronize", "empty_cache", "record begins", block_of_the_peak, "step", "record ends"]
    assert calls == warm_up + recording
    assert run() is result and run() is result
    assert calls[-2:] == ["replay", "replay"] and calls.count("step") == 3


# ---------------------------------------------------------------------------------------------- costs


def test_flops_are_those_of_torch():
    aten = torch.ops.aten
    attention = {  # some supported versions of PyTorch have no formulas for it
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    case = replace(CASE, dtype=torch.bfloat16)  # in fp32 a module takes the tokens themselves, a leaf: torch refuses
    with FakeTensorMode(), torch.device("cpu"), fused.forced(True):  # the forms for a GPU, which `estimate` counts
        ours, tensors = build(SVD, case, "cpu"), inputs(case, "cpu")
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            case.step.run(ours, *tensors)
    cost, nothing = estimate(replace(case, compared=False))
    assert cost.tflop * 1e12 == counter.get_total_flops() > 0
    assert nothing is None


def test_encoding_is_shared_by_the_steps_of_a_recipe():
    recipe = replace(make_recipe(TOY, "muon"), num_cached_views=25, steps=500)
    share = encoding_per_step(Cost(1, 2, tflop=28, traffic_tb=14), recipe, num_frames=14)
    assert (share.weights_gib, share.peak_gib) == (1, 2)
    assert share.tflop == pytest.approx(1.5)  # 15 frames are encoded for 20 steps, 14 of them cost 28
    assert share.traffic_tb == pytest.approx(0.75)


# ---------------------------------------------------------------------------------------------- times


class Watched:
    """Builds models, and notes what runs and what is in memory when a model is built."""

    def __init__(self):
        self.models, self.built, self.runs = [], [], []
        self.case = replace(CASE, step=Step(lambda model: lambda: self.runs.append(type(model)), (), ()))

    def __call__(self, library, case, device):
        self.built.append((library, [type(model()) for model in self.models if model() is not None]))
        model = build(library, case, device)
        model.call = model.__call__  # a reference cycle, as torch.compile makes one
        self.models.append(weakref.ref(model))
        return model


def test_a_line_is_measured_with_one_library_in_memory():
    build = Watched()
    lines = [alone("train", build.case, library, "eager", "cpu", 2, build) for library in ("ours", "diffusers")]
    assert build.built == [(SVD, []), (Diffusers, [])]
    assert build.runs == [SVD] * 5 + [Diffusers] * 5  # the first, two for warm-up, two that are timed
    for line, library in zip(lines, ("ours", "diffusers")):
        assert (line.case, line.library, line.form) == ("train", library, "eager")
        assert 0 < line.min_s <= line.seconds <= line.max_s and line.first_s > 0
        assert line.allocated_gib is None and line.reserved_gib is None


def test_on_a_gpu_a_line_has_the_peaks_from_the_first_run_on(monkeypatch):
    calls = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5 * 2**30)
    monkeypatch.setattr("minimti.bench.measure.inputs", lambda *_: [])
    step = Step(lambda _: lambda: calls.append("step"), (), ())
    line = alone("train", replace(CASE, step=step), "ours", "eager", "cuda", 1, lambda *_: build(SVD, CASE, "cpu"))
    assert (line.allocated_gib, line.reserved_gib) == (3, 5)
    assert calls.index("reset_peak_memory_stats") < calls.index("step")
    assert calls.count("reset_peak_memory_stats") == 1
    assert calls[-3:] == ["synchronize", "step", "synchronize"]


def test_by_turns_both_libraries_are_in_memory():
    build = Watched()
    ratio = by_turns(build.case, "eager", "cpu", repeats=2, build=build)
    assert build.built == [(SVD, []), (Diffusers, [SVD])]
    assert build.runs == [SVD, Diffusers] * 3  # the first round is the warm-up
    assert ratio.ours_s > 0 and ratio.diffusers_s > 0 and ratio.form == "eager"


def test_a_ratio_is_the_median_of_rounds():
    ratio = summarise("graph", [1.0, 2.0, 4.0], [3.0, 3.0, 3.0])
    assert (ratio.form, ratio.ours_s, ratio.diffusers_s) == ("graph", 2, 3)
    assert (ratio.ratio, ratio.ratio_min, ratio.ratio_max) == (1.5, 0.75, 3)
