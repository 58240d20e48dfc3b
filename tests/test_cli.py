"""The command line as a person calls it: a process, its output, its exit code."""

import json
import subprocess
import sys
import time

import pytest
import torch

from oodkern import _native
from oodkern.cli import main
from oodkern.data import DataConfig, build_split

SHORT = ("epochs=1", "pretrain.epochs=2", "model.width=8")


def call(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", "oodkern", *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    started = time.perf_counter()
    done = call("train", cwd=folder)
    assert time.perf_counter() - started < 90
    return folder, done


def test_bare_train_prints_one_table(bare):
    folder, done = bare
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("baseline", "energy "))]
    assert [(row[0], row[3]) for row in rows] == [
        ("baseline", "near"), ("baseline", "far"), ("energy", "near"), ("energy", "far"),
    ]  # fmt: skip
    assert rows[0][1] in ("msp", "energy")
    assert all(0 <= float(number) <= 100 for row in rows for number in (row[2], *row[4:]))
    head = next(line for line in done.stdout.splitlines() if line.startswith("model"))
    assert head.split("  ")[-1].strip() == "FPR95(ID+)"
    assert "AUPR" in head
    assert max(map(len, done.stdout.splitlines())) <= 150
    assert "the report is runs/energy-seed0/report.html" in done.stdout
    for name in ("last.ckpt", "best.ckpt", "report.html"):
        assert (folder / "runs" / "energy-seed0" / name).is_file()


def test_a_second_run_does_not_take_the_place_of_the_first(bare):
    folder, _ = bare
    done = call("train", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("oodkern train: runs/energy-seed0 holds a run (epoch 10 of energy): --resume goes on")
    assert done.stderr.count("\n") == 1


def test_evaluate_prints_the_numbers_of_the_run(bare, capsys, monkeypatch):
    folder, trained = bare
    monkeypatch.chdir(folder)
    assert main(["evaluate", "runs/energy-seed0"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in trained.stdout.splitlines() if line.startswith("energy ")]
    assert [line.split() for line in printed.splitlines() if line.startswith("energy ")] == [
        row.split() for row in rows
    ]
    assert "last.ckpt, epoch 10 of energy" in printed
    assert "At the stored threshold, " in printed
    assert main(["evaluate", "--json", "runs/energy-seed0", "--checkpoint", "best", "data.ood.patches=photos"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ood"]["patches"]["n_ood"] == 360
    assert found["flagged"]["patches"] > 0.9
    assert found["checkpoint"] == "best"


def write_images(folder):
    from PIL import Image

    split = build_split(DataConfig())
    images = {"known": split.test, "far": split.test_ood["far"]}
    folder.mkdir()
    for name, one in images.items():
        for i in range(8):
            pixels = (one.images(torch.tensor([i]))[0, 0] * 255).round().byte().numpy()
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
    return [split.classes[label] for label in split.test.labels[:8]]


def test_score(bare, capsys, tmp_path):
    folder, _ = bare
    classes = write_images(tmp_path / "images")
    run = str(folder / "runs" / "energy-seed0")
    assert main(["score", run, str(tmp_path / "images")]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["image", "class", "score", "OOD"]
    found = {line[0].rsplit("/", 1)[1]: line[1:] for line in lines[1:]}
    assert len(found) == 16
    assert sum(found[f"known{i}.png"][0] == classes[i] for i in range(8)) >= 7
    assert [found[f"far{i}.png"][2] for i in range(8)] == ["yes"] * 8
    assert [found[f"known{i}.png"][2] for i in range(8)].count("no") >= 6

    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    assert main(["score", run, str(tmp_path / "images"), "--json"]) == 2
    captured = capsys.readouterr()
    assert "broken.png: not a readable image" in captured.err
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert len(records) == 16
    for one in records:
        assert one["ood"] == (one["score"] > one["threshold"])
        assert f"{one['score']:.4f}" == found[one["image"].rsplit("/", 1)[1]][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "oodkern evaluate: nowhere: expected the folder of a run, with a config.yaml"),
        (["score", "RUN", "nothing.png"], "oodkern score: nothing.png: no such file or folder"),
        (
            ["evaluate", "RUN", "--device", "gpu"],
            "oodkern evaluate: device: expected auto, cpu, cuda or cuda:N, got 'gpu'",
        ),
        (
            ["score", "RUN", "x.png", "--device", "cuda:99"],
            f"oodkern score: device: expected one of {torch.cuda.device_count()} CUDA devices, got cuda:99",
        ),
        (["evaluate", "RUN", "optimizer.lr=3"], "oodkern evaluate: optimizer.lr=3: expected data.ood.NAME=SOURCE"),
        (["evaluate", "RUN", "data.split=3"], "oodkern evaluate: data.split=3: expected data.ood.NAME=SOURCE"),
        (["evaluate", "RUN", "data.ood.x=digits"], "oodkern evaluate: data.ood.x: the ID images are digits"),
        (["train", "[=3"], "oodkern train: [=3: expected key=value"),
        (["train", "output=/proc/none/x"], "oodkern train: [Errno 2]"),
        (["compare", "--methods", "energi"], "oodkern compare: method: expected one of ce, oe, energy, edge"),
        (["compare", "--methods", "oe", "--splits", "0"], "oodkern compare: --splits: expected 1 or more, got 0"),
        (["train", "data.name=idx:/none"], "oodkern train: idx:/none: expected a folder, and /none is none"),
        (["train", "pretrain.checkpoint=/none", "name=y"], "oodkern train: pretrain.checkpoint: /none: FileNotFound"),
        (["train", "none.yaml"], "oodkern train: none.yaml: no such file"),
    ],
)
def test_mistakes_are_2_and_one_line(bare, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(bare[0])
    assert main([word.replace("RUN", "runs/energy-seed0") for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_wrong_usage_is_2_and_one_line(tmp_path):
    done = call("train", "optimizer.lrr=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "oodkern train: optimizer.lrr: no such key (did you mean optimizer.lr?)"
    assert not (tmp_path / "runs").exists()


def test_options_that_are_not_there(capsys):
    for arguments in (["train", "--foo"], ["doctor", "x"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_starting_from_a_model_that_was_trained_before(tmp_path, capsys):
    assert main(["train", *SHORT, f"output={tmp_path}", "name=first", "--quiet"]) == 0
    start = f"pretrain.checkpoint={tmp_path}/first/last.ckpt"
    assert main(["train", *SHORT[::2], f"output={tmp_path}", "name=again", start, "--quiet"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("baseline")]
    assert rows[:2] == rows[2:]
    state = torch.load(tmp_path / "first" / "last.ckpt", weights_only=True)["baseline"]
    plain = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    torch.save(plain, tmp_path / "plain.pt")
    start = f"pretrain.checkpoint={tmp_path}/plain.pt"
    assert main(["train", *SHORT[::2], f"output={tmp_path}", "name=plain", start, "--quiet"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("baseline")] == rows[:2]
    assert main(["train", f"output={tmp_path}", "name=other", start]) == 2  # of another width
    assert "pretrain.checkpoint: " in capsys.readouterr().err


def test_compare(tmp_path, capsys):
    arguments = ["compare", "--methods", "ce,oe", *SHORT, f"output={tmp_path}", "--seeds", "0,1"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "4 of 4: oe-seed1" in captured.err
    assert "Differences are paired" in " ".join(captured.out.split())
    assert any((line.startswith("oe") and "2 of 2" in line) or "of 2" in line for line in captured.out.splitlines())
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = found["runs"][0]
    assert (run["method"], set(run["by_score"])) == ("ce", {"msp", "energy"}), "ce may be judged by either"
    assert run["environment"]["torch"] == torch.__version__
    assert set(found["runs"][1]["by_score"]) == {"msp"}
    assert (found["methods"], found["unit"], found["splits"]) == (["ce", "oe"], "seed", [None])
    assert found["command"].startswith("oodkern compare --methods ce,oe epochs=1")


def test_not_finite_is_3(tmp_path, capsys):
    # A learning rate at which float32 overflows.
    code = main(["train", f"output={tmp_path}", "pretrain.lr=1e30", "pretrain.epochs=2", "--quiet"])
    assert code == 3
    message = capsys.readouterr().err
    assert "not_finite.pt" in message
    assert (tmp_path / "energy-seed0" / "not_finite.pt").is_file()


def test_divergence_on_the_last_step_is_3_and_leaves_no_other_run(tmp_path, capsys):
    arguments = [f"output={tmp_path}", "name=r", "pretrain.epochs=1", "epochs=1"]
    assert main(["train", *arguments, "--quiet"]) == 0
    assert (tmp_path / "r" / "last.ckpt").is_file()
    diverging = ["epochs=0", "optimizer.batch_size=644", "pretrain.lr=1e30", "--quiet", "--overwrite"]
    code = main(["train", *arguments, *diverging])
    assert code == 3
    assert "logits are not finite, at step 1 of pretrain; the batch is in" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "r").iterdir()} - {"tensorboard"} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "not_finite.pt",
    }


def test_a_file_with_an_equals_sign_in_its_path(tmp_path, monkeypatch, capsys):
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "c.yaml").write_text("seed: 77\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--show", "lr=1/c.yaml"]) == 0
    assert "seed: 77" in capsys.readouterr().out


def test_show_prints_every_key(capsys):
    assert main(["train", "--show", "method=oe", "loss.alpha=0.3"]) == 0
    printed = capsys.readouterr().out
    assert "method: oe" in printed
    assert "  alpha: 0.3" in printed


@pytest.mark.parametrize("verb", ["train", "evaluate", "score", "compare", "plan", "bench"])
def test_help_teaches(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"  oodkern {verb} " in printed
    assert "exit codes: 0 done, 2 wrong usage" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_progress_shows_loss_parts_speed_and_time_left(tmp_path):
    import fcntl
    import os
    import pty
    import select
    import struct
    import termios

    main_end, child_end = pty.openpty()  # bars are for terminals
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [sys.executable, "-m", "oodkern", "train", *SHORT, "epochs=30", f"output={tmp_path}"]
    process = subprocess.Popen(command, stdout=child_end, stderr=child_end)
    os.close(child_end)
    shown = b""
    while process.poll() is None or select.select([main_end], [], [], 0)[0]:
        try:
            shown += os.read(main_end, 4096) if select.select([main_end], [], [], 1)[0] else b""
        except OSError:
            break
    assert process.wait() == 0
    bars = [line for line in shown.decode(errors="replace").split("\r") if line.startswith("energy:") and "ce=" in line]
    assert bars, shown
    for part in ("loss=", "energy_in=", "energy_out=", "images/s=", "memory=", "<00:"):  # tqdm: elapsed<left
        assert any(part in bar for bar in bars), part


def test_doctor(tmp_path):
    done = call("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "energy on cpu: native" in done.stdout
    assert f"in use {_native.instruction_set_in_use()}" in done.stdout
    assert "omegaconf" in done.stdout


def test_doctor_without_the_module_that_tells(tmp_path):
    """The module is for one version of Python, the kernels for all."""
    program = "import sys; sys.modules['oodkern._build'] = None; from oodkern.cli import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "what was built is not known" in done.stdout
    assert "energy on cpu: native" in done.stdout
