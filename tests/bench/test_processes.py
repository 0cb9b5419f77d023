"""The two programs as processes, at the size of the tests."""

import os
import sys
from dataclasses import replace

import pytest
import torch
from official import MINI
from safetensors import safe_open

from minimti import load
from minimti.bench import processes
from minimti.bench.processes import Event, Programs, check_programs, watch, write_inputs, write_weights
from minimti.bench.report import NotMeasurable
from minimti.io.files import InputError

TINY = replace(MINI, num_frames=2, num_steps=2)


def run(code: str):
    return watch([sys.executable, "-c", code], os.environ)


def test_lines_and_bars_of_a_process_are_noted_when_they_appear():
    _, events = run(
        "import time\n"
        "from tqdm import tqdm\n"
        "print('model      tiny from a file')\n"
        "bar = tqdm(total=3, desc='inversion', bar_format='{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]')\n"
        "for loss in (1, 2, 3):\n"
        "    time.sleep(0.05)\n"
        "    bar.set_postfix(loss=loss, refresh=False)\n"
        "    bar.update(1)\n"
        "bar.close()\n"
        "print('embedding  m.pt')\n"
    )
    assert [event.label for event in events] == ["model"] + ["inversion"] * (len(events) - 2) + ["embedding"]
    times = {(event.label, event.step): event.seconds for event in reversed(events)}
    assert [(label, step) for label, step in times if label == "inversion"][::-1] == [
        ("inversion", step) for step in range(4)
    ]
    assert times["inversion", 3] - times["inversion", 1] > 0.09
    assert {event.steps for event in events[1:-1]} == {3}


def test_the_seconds_of_a_process_are_those_until_its_end():
    seconds, events = run("import time; print('early', flush=True); time.sleep(0.3)")
    assert events[0].label == "early" and seconds - events[0].seconds > 0.25


def test_a_process_that_fails_is_an_error_with_its_last_line():
    with pytest.raises(RuntimeError, match="ended with 2: sample.py: error: no such image"):
        run("import sys; print('note'); print('sample.py: error: no such image', file=sys.stderr); sys.exit(2)")


def test_a_process_does_not_outlive_an_interrupt(monkeypatch):
    pids = []

    def interrupt(descriptor):
        pids.append(int(os.read(descriptor, 100)))
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_pieces", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("import os, time; print(os.getpid()); time.sleep(600)")
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_the_weight_file_is_half_precision_and_loads(tmp_path):
    write_weights(tmp_path / "svd.safetensors", TINY, "cpu")
    with safe_open(tmp_path / "svd.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    svd = load(str(tmp_path / "svd.safetensors"), device="cpu")
    assert svd.config == TINY
    norm = svd.unet.conv_norm_out
    assert norm.weight.mean() == pytest.approx(1, abs=0.1) and norm.bias.mean() == pytest.approx(0, abs=0.1)
    weight = svd.unet.conv_in.weight
    assert weight.std() * weight[0].numel() ** 0.5 == pytest.approx(1, abs=0.1)


def test_inputs_have_the_size_of_the_model(tmp_path):
    from minimti import read_clip, read_image

    clip, pictures = tmp_path / "clip.mp4", [tmp_path / "0.png", tmp_path / "1.png"]
    write_inputs(clip, pictures, TINY)
    frames = read_clip(clip, TINY).frames
    assert frames.shape == (2, 3, 32, 48) and (frames[0] - frames[1]).abs().mean() > 0.05
    images = [read_image(path, TINY) for path in pictures]
    assert images[0].shape == (1, 3, 32, 48) and (images[0] - images[1]).abs().mean() > 0.05


@pytest.mark.full
def test_both_programs_run_and_what_is_computed_follows_from_what_was_measured(tmp_path):
    programs = Programs(tmp_path, TINY, "cpu", steps=12, views=3, images=2)
    assert programs.write()["GB"] == pytest.approx(programs.weights.stat().st_size / 1e9)
    train, sample = programs.train(cold=True), programs.sample(cold=False)
    assert 0 < train["loaded"] < train["first step with one view (computed)"] < train["wall"]
    assert train["step"] > 0 and train["view"] > 0
    expected = train["wall"] + (1000 - 12) * train["step"] + (100 - 3) * train["view"]
    assert train["inversion by paper (computed)"] == pytest.approx(expected)
    assert train["inversion by muon (computed)"] < expected
    assert 0 < sample["next video"] < sample["first video"] < sample["wall"]
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2


def test_steps_that_appear_together_are_told_by_the_last_of_them(tmp_path, monkeypatch):
    """On a GPU losses are fetched every ten steps: steps 1 to 10 appear when 10 are done."""
    programs = Programs(tmp_path, TINY, "cuda", steps=20, views=3)
    done = [Event(1.0 * (step // 10 + 1) + 4, "inversion", 10 * (step // 10) + step % 10 + 1, 20) for step in range(20)]
    views = [Event(2.0, "encoding", 0, 3)] + [Event(1.5 + 0.5 * view, "encoding", view, 3) for view in (1, 2, 3)]
    events = [Event(1.25, "model"), *views, Event(4.0, "inversion", 0, 20), *done]
    monkeypatch.setattr(programs, "_run", lambda *_: (7.0, events))
    found = programs.train(cold=False)
    assert (found["step"], found["view"], found["loaded"]) == (0.1, 0.5, 1.25)
    assert found["first step with one view (computed)"] == pytest.approx(5 - 9 * 0.1 - 2 * 0.5)


def test_only_a_cold_process_reads_its_weights_from_the_disk(tmp_path, monkeypatch):
    evicted, programs = [], Programs(tmp_path, TINY, "cpu")
    programs.images[-1].touch()
    programs.embedding.touch()
    monkeypatch.setattr(processes, "evict", evicted.append)
    monkeypatch.setattr(processes, "watch", lambda *_: (3.0, [Event(1.0, "video"), Event(2.0, "video")]))
    programs.sample(cold=False)
    assert not evicted
    programs.sample(cold=True)
    assert evicted == [programs.weights]


def test_what_was_not_written_is_named(tmp_path):
    programs = Programs(tmp_path, TINY, "cpu")
    with pytest.raises(NotMeasurable, match="needs 'write' first"):
        programs.train(cold=False)
    with pytest.raises(NotMeasurable, match="needs 'write', then 'train_cold' or 'train_warm', first"):
        programs.sample(cold=False)


def test_an_installed_package_has_no_programs(tmp_path, monkeypatch):
    check_programs()
    monkeypatch.setattr("minimti.bench.processes.ROOT", tmp_path)
    with pytest.raises(InputError, match="run it in a checkout"):
        check_programs()
