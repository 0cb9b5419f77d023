"""The cases of the benchmark and their measurement, at toy sizes."""

import weakref
from dataclasses import replace

import pytest
import torch
from official import SMALL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from minimti.bench.cases import DECODE, DENOISE, ENCODE, SAMPLE, TRAIN, Case, Step, build, cpu_cases, inputs
from minimti.bench.cost import Cost
from minimti.bench.measure import Run, clock, encoding_per_step, estimate, summarise, table
from minimti.bench.reference import Diffusers
from minimti.invert import make_recipe
from minimti.networks.recompute import Checkpointed
from minimti.networks.unet import UNet
from minimti.svd import SVD

pytest.importorskip("diffusers")

UNET = replace(SMALL.unet, channel_mult=(1,), attention_resolutions=(1,), num_res_blocks=1)
TOY = replace(SMALL, num_frames=2, size=(32, 16), unet=UNET, vae=replace(SMALL.vae, ch_mult=(1, 2)))
CASE = Case(TRAIN, TOY, torch.float32)


# ---------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize("step", [TRAIN, DENOISE, ENCODE, DECODE], ids=lambda step: step.run.__name__)
def test_both_libraries_compute_the_same(step):
    """Up to another epsilon in diffusers' norms."""
    case = Case(step, SMALL, torch.float32)
    tensors = inputs(case, "cpu")
    results = []
    for library in (SVD, Diffusers):
        torch.manual_seed(1)  # the noise of a training step
        results.append(step.run(build(library, case, "cpu"), *tensors))
    ours, theirs = results
    assert ours.shape == theirs.shape
    assert ours.norm() > 0
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.parametrize("step", [TRAIN, DECODE, SAMPLE], ids=lambda step: step.run.__name__)
def test_a_model_holds_only_the_networks_that_its_step_uses(step):
    case = replace(CASE, step=step, dtype=torch.bfloat16)
    ours = {name.partition(".")[0]: weight.dtype for name, weight in build(SVD, case, "cpu").named_parameters()}
    dtypes = {"unet": torch.bfloat16, "vae": torch.float32, "image_encoder": torch.bfloat16}
    assert ours == {name: dtypes[name] for name in step.networks}
    theirs = build(Diffusers, case, "cpu")
    assert {name for name, _ in theirs.named_children()} == set(step.networks) - {"image_encoder"}


def test_each_library_recomputes_as_the_case_says():
    case = replace(CASE, mode="low", checkpointing=True)
    modes = {module.mode for module in build(SVD, case, "cpu").modules() if isinstance(module, Checkpointed)}
    assert modes == {"low"}
    assert build(Diffusers, case, "cpu").unet.is_gradient_checkpointing
    assert not build(Diffusers, CASE, "cpu").unet.is_gradient_checkpointing


def test_weights_are_equal_and_each_library_has_its_own_memory_format():
    ours, theirs = (build(library, CASE, "cpu").unet.conv_in.weight for library in (SVD, Diffusers))
    assert (ours == theirs).all()
    assert ours.is_contiguous(memory_format=torch.channels_last) and theirs.is_contiguous()


def test_bf16_is_timed_only_where_the_processor_has_it():
    fp32 = ["tiny_train_fp32", "tiny_train_compiled_fp32", "train_fp32", "denoise_fp32"]
    assert list(cpu_cases(SMALL, bf16=False)) == fp32
    assert list(cpu_cases(SMALL, bf16=True)) == fp32 + [name.replace("fp32", "bf16") for name in fp32]
    assert cpu_cases(SMALL, bf16=True)["train_bf16"].dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- costs


def test_flops_are_those_of_torch():
    aten = torch.ops.aten
    attention = {  # some supported versions of PyTorch have no formulas for it
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    ours = build(SVD, CASE, "cpu")
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        CASE.step.run(ours, *inputs(CASE, "cpu"))
    cost, nothing = estimate(replace(CASE, compared=False))
    assert cost.tflop * 1e12 == counter.get_total_flops() > 0
    assert nothing is None


def test_encoding_is_shared_by_the_steps_of_a_recipe():
    recipe = replace(make_recipe(TOY, "muon"), num_cached_views=25, steps=500)
    share = encoding_per_step(Cost(1, 2, tflop=28, traffic_tb=14), recipe, num_frames=14)
    assert (share.weights_gib, share.peak_gib) == (1, 2)
    assert share.tflop == pytest.approx(1.5)  # 15 frames are encoded for 20 steps, 14 of them cost 28
    assert share.traffic_tb == pytest.approx(0.75)


# ---------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("by_turns", [False, True])
def test_only_runs_by_turns_hold_both_libraries_at_once(by_turns):
    models = []  # weak references, in the order in which the models were built
    built = []  # libraries, each with those in memory before it
    runs = []

    def watched(library, case, device):
        built.append((library, [type(model()) for model in models if model() is not None]))
        model = build(library, case, device)
        model.call = model.__call__  # a reference cycle, as torch.compile makes one
        models.append(weakref.ref(model))
        return model

    step = Step(lambda model: runs.append(type(model)), networks=(), inputs=())
    timing = clock(replace(CASE, step=step), "cpu", repeats=2, by_turns=by_turns, build=watched)
    assert built == [(SVD, []), (Diffusers, [SVD] if by_turns else [])]
    assert not any(model() for model in models)
    warm_up = [SVD, Diffusers]
    assert runs == (warm_up + [SVD, Diffusers] * 2 if by_turns else [SVD] * 3 + [Diffusers] * 3)
    assert timing.ours_s > 0 and timing.diffusers_s > 0 and timing.ours_gib is None


def test_a_library_that_is_left_out_is_not_built():
    built = []

    def watched(library, case, device):
        built.append(library)
        return build(library, case, device)

    timing = clock(replace(CASE, mode="low", compared=False), "cpu", repeats=1, by_turns=False, build=watched)
    assert built == [SVD]
    assert timing.ours_s > 0 and timing.diffusers_s is None and timing.ratio is None


def test_the_other_library_is_timed_when_one_runs_out_of_memory(capsys):
    def step(model):
        if isinstance(model, Diffusers):
            raise torch.OutOfMemoryError

    case = replace(CASE, step=Step(step, networks=(), inputs=()))
    timing = clock(case, "cpu", repeats=1, by_turns=False)
    assert timing.ours_s > 0 and timing.diffusers_s is None and timing.ratio is None
    assert capsys.readouterr().err == "  Diffusers: not enough memory\n"


def test_only_our_unet_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append((type(module), options)))
    clock(CASE, "cpu", repeats=1, by_turns=True)
    assert not compiled
    clock(replace(CASE, compiled=True), "cpu", repeats=1, by_turns=True)
    assert compiled == [(UNet, {"fullgraph": True, "dynamic": False})]


def test_a_timing_is_the_median_of_runs_and_of_their_ratios():
    ours = [Run(1.0, 5.0), Run(2.0, 7.0), Run(4.0, 6.0)]
    theirs = [Run(3.0, 9.0), Run(3.0, 8.0), Run(3.0, 8.0)]
    timing = summarise(ours, theirs)
    assert (timing.ours_s, timing.diffusers_s) == (2, 3)
    assert (timing.ours_gib, timing.diffusers_gib) == (7, 9)
    assert (timing.ratio, timing.ratio_min, timing.ratio_max) == (1.5, 0.75, 3)


def test_the_table_leaves_out_what_was_not_measured():
    cost = Cost(weights_gib=1, peak_gib=2, tflop=31.2, traffic_tb=0.1)
    costs = {"train": (cost, replace(cost, peak_gib=4, traffic_tb=0.2)), "sample": (cost, None)}
    rows = table(costs, {"train": summarise([Run(0.5, None)], [Run(0.75, None)])}).splitlines()
    assert len({len(row) for row in rows}) == 1
    head, line, train, sample = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)
    assert head == ["step", "peak GiB", "TFLOP", "TB moved", "A100 s, at least", "s here", "diffusers : ours"]
    assert set("".join(line)) == {"-"}
    moved = ["0.100 / 0.200", "0.100 / 0.100"]
    assert train == ["train", "2.00 / 4.00", "31.20 / 31.20", *moved, "0.500 / 0.750", "1.50 (1.50..1.50)"]
    assert sample == ["sample", "2.00 / -", "31.20 / -", "0.100 / -", "0.100 / -", "-", "-"]
