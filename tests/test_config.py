import pytest
import yaml

from oodkern._options import explanations
from oodkern.config import ConfigError, load_config, to_yaml
from oodkern.methods import METHODS
from oodkern.methods.energy import EnergyOptions
from oodkern.methods.outlier_exposure import OutlierExposureOptions


def test_the_schema_follows_the_method(tmp_path):
    assert load_config().loss == EnergyOptions()
    assert load_config(None, ["method=oe"]).loss == OutlierExposureOptions(alpha=0.5)
    file = tmp_path / "config.yaml"
    file.write_text("method: oe\nseed: 4\nloss:\n  alpha: 0.25\noptimizer: {lr: 1e-3}\n")
    config = load_config(str(file), ["seed=5", "model.width=8"])
    assert (config.method, config.seed, config.loss.alpha, config.model.width) == ("oe", 5, 0.25, 8)
    assert config.optimizer.lr == 1e-3


def test_the_embedded_sets_have_defaults_that_suit_them():
    config = load_config(None, ["data.name=digits-multilabel"])
    assert (config.optimizer.name, config.optimizer.lr, config.loss.alpha) == ("adamw", 0.001, 0.0003)
    config = load_config(None, ["data.name=digits-multilabel", "optimizer.lr=0.5", "method=oe"])
    assert (config.optimizer.name, config.optimizer.lr, config.loss.alpha) == ("adamw", 0.5, 0.1)
    assert (config.batch_norm, config.optimizer.outlier_batch_size, config.pretrain.epochs) == ("frozen", 64, 40)


def test_names_of_run_folders():
    def folder(*overrides):
        return str(load_config(None, list(overrides)).folder)

    assert folder() == "runs/energy-seed0"
    assert folder("method=oe", "seed=3", "data.split=2") == "runs/oe-split2-seed3"
    assert folder("data.name=digits-multilabel") == "runs/digits-multilabel-energy-seed0"
    assert folder("data.name=idx:/data/fashion_mnist/") == "runs/fashion_mnist-energy-seed0"
    assert folder("name=x", "output=/tmp/y") == "/tmp/y/x"
    assert folder("data.name=python:my set/../v 1") == "runs/v-1-energy-seed0"
    assert folder("data.name=python:..") == "runs/data-energy-seed0"


def test_sets_of_the_test_have_names_of_their_own(tmp_path):
    config = load_config(None, ["data.ood.far=photos", "data.ood.other-set=folder:/x"])
    assert config.data.ood == {"far": "photos", "other-set": "folder:/x"}
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(str(file)) == config


def test_resolved_configuration_reads_back(tmp_path):
    config = load_config(None, ["method=energy", "loss.margins=fixed", "loss.margin_in=-9", "name=x"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(str(file)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=energi"], f"method: expected one of {', '.join(METHODS)}, got 'energi' (did you mean energy?)"),
        (["optimizer.lrr=1"], "optimizer.lrr: no such key (did you mean optimizer.lr?)"),
        (["lr=1"], "lr: no such key (did you mean optimizer.lr?)"),
        (["method=oe", "loss.margin_in=1"], "loss.margin_in: no such key"),
        (["loss=3"], "loss: a group, set one of its keys (alpha, margins,"),
        (["seed.x=3"], "seed: expected one value, got a group"),
        (["epochs=abc"], "epochs: Value 'abc' of type 'str' could not be converted to Integer"),
        (["epochs=-1"], "epochs: expected 0 or more, got -1"),
        (["optimizer.batch_size=0"], "optimizer.batch_size: expected a positive number, got 0"),
        (["optimizer.lr=nan"], "optimizer.lr: expected a positive number, got nan"),
        (["precision=bf61"], "precision: expected one of fp32, bf16, fp16, got 'bf61' (did you mean bf16?)"),
        (["schedule.name=cosin"], "schedule.name: expected one of cosine, step, constant, got 'cosin'"),
        (["schedule.milestones=[0.5,2]"], "schedule.milestones[1]: expected 0 or more and less than 1, got 2.0"),
        (["optimizer.name=adam"], "optimizer.name: expected one of sgd, adamw, got 'adam'"),
        (["device=gpu"], "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["model.name=resnet"], "wrn_40, resnet18, timm:NAME or torchvision:NAME, got 'resnet'"),
        (["data.ood.far.x=1"], "data.ood.far: expected one value, got a group"),
        (["data.name=digits-multilabel", "loss.temperature=2"], "temperature: JointEnergy has none"),
        (["loss.margins=x"], "loss.margins: expected one of auto, fixed, got 'x'"),
        (["loss.margins=fixed", "loss.margin_in=0"], "margin_in < margin_out"),
        (["loss.margin_in=-8"], "loss.margin_in: counts with loss.margins=fixed alone, got -8.0 without it"),
        (["method=greg", "loss.margin_out=-5"], "loss.margin_out: counts with loss.margins=fixed alone, got -5.0"),
        (["method=separation", "loss.margins=fixed"], "loss.margins: counts with loss.outlier_loss=energy alone"),
        (["method=separation", "loss.margin_in=-9"], "loss.margin_in: counts with loss.outlier_loss=energy alone"),
        (["loss.temperature=0"], "temperature: expected a positive number"),
        (["seed=-1"], "seed: expected 0 or more and less than 4294967296, got -1"),
        (["threads=100000"], "threads: expected 0 or more and less than 1024, got 100000"),
        (["optimizer.momentum=2"], "optimizer.momentum: expected 0 or more and less than 1, got 2.0"),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay: expected 0 or more, got -1.0"),
        (["output=/dev/null"], "output, name: expected a folder, and /dev/null"),
        (["loss.alpha=-1"], "alpha: expected a finite number that is not negative, got -1.0"),
        (["outliers.pool=x", "outliers.policy=gregpls"], "outliers.policy: expected one of uniform, energy-window,"),
        (["outliers.policy=gregpls"], "gregplus, got 'gregpls' (did you mean gregplus?)"),
        (["outliers.pool=x", "outliers.refresh=0"], "outliers.refresh: expected epoch or a number of steps from 1 on"),
        (["outliers.refresh=9"], "outliers.pool: expected features, or auto, for outliers.refresh to count; got none"),
        (["method=ce", "outliers.pool=x"], "outliers.pool: expected none, since ce takes no outlier images, got x"),
        (["loss.alpha"], "loss.alpha: expected key=value"),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(str(tmp_path / "none.yaml"))
    file = tmp_path / "list.yaml"
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected `key: value` lines"):
        load_config(str(file))
    for content in (b"a: [1\n", b"\xff\xfe\x00"):
        file.write_bytes(content)
        with pytest.raises(ConfigError):
            load_config(str(file))


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_a_file_counts_over_its_base(tmp_path):
    write(tmp_path, top="method: oe\nepochs: 3\nbase: inner/middle.yaml\ndata: {ood: {b: 'folder:/b'}}\n")
    write(
        tmp_path / "inner",
        middle="base: ../bottom.yaml\nseed: 5\nschedule: {milestones: [0.5]}\ndata: {ood: {a: 'folder:/a'}}\n",
    )
    write(tmp_path, bottom="seed: 6\nthreads: 7\nepochs: 8\nschedule: {milestones: [0.1, 0.2], gamma: 0.5}\n")
    config = load_config(str(tmp_path / "top.yaml"), ["threads=1"])
    assert (config.method, config.epochs, config.seed, config.threads) == ("oe", 3, 5, 1)
    assert (config.schedule.milestones, config.schedule.gamma) == ([0.5], 0.5)
    assert config.data.ood == {"a": "folder:/a", "b": "folder:/b"}
    write(tmp_path, two="base: [top.yaml, bottom.yaml]\nthreads: 2\n")
    config = load_config(str(tmp_path / "two.yaml"))
    assert (config.method, config.epochs, config.seed, config.threads) == ("oe", 8, 6, 2)
    # What is kept of a run stands alone.
    write(tmp_path / "elsewhere", kept=to_yaml(config))
    assert "base" not in yaml.safe_load(to_yaml(config))
    assert load_config(str(tmp_path / "elsewhere" / "kept.yaml")) == config


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: b.yaml\n"}, "/a.yaml: base: no such file: "),
        ({"a": "base: a.yaml\n"}, "/a.yaml: base: expected a file that is not based on this one, got a.yaml"),
        ({"a": "base: b.yaml\n", "b": "base: ./a.yaml\n"}, "/b.yaml: base: expected a file that is not based on this"),
        ({"a": "base: 3\n"}, "/a.yaml: base: expected a file or a list of files, got 3"),
        (
            {"a": "base: [b.yaml, {}]\n", "b": ""},
            "/a.yaml: base: expected a file or a list of files, got ['b.yaml', {}]",
        ),
        ({"a": "base:\n"}, "/a.yaml: base: expected a file or a list of files, got None"),
        ({"a": "base: [b.yaml, c.yaml]\n", "b": ""}, "/a.yaml: base: no such file: "),
        ({"a": "base: b.yaml\n", "b": "- 1\n"}, "/b.yaml: expected `key: value` lines"),
        ({"a": "base: b.yaml\n", "b": "x: [1\n"}, "/b.yaml: while parsing"),
        ({"a": "base: b.yaml\n", "b": "epoch: 1\n"}, "epoch: no such key (did you mean epochs?)"),
        ({"a": "base: b.yaml\ndata: [1]\n", "b": "data: {limit: 3}\n"}, "/a.yaml: expected a group, a list or one"),
    ],
)
def test_mistakes_of_bases_are_one_line(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "a.yaml"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_key_is_explained(method):
    config = load_config(None, [f"method={method}", "data.ood.far=photos", "schedule.milestones=[0.2,0.4]"])
    known = explanations(config)
    assert {"epochs", "data.ood", "loss", "schedule.milestones"} <= known.keys()
    assert all(known.values()), [key for key, meaning in known.items() if not meaning]
    text = to_yaml(config, explained=True)
    for key, meaning in known.items():
        assert f"# {meaning}" in text, key
    assert yaml.safe_load(text) == yaml.safe_load(to_yaml(config))
    assert max(map(len, text.splitlines())) <= 150
