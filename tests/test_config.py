import pytest

from oodkern.config import ConfigError, load_config, to_yaml
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


def test_resolved_configuration_reads_back(tmp_path):
    config = load_config(None, ["method=energy", "loss.margins=fixed", "loss.margin_in=-9", "name=x"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(str(file)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=energi"], "method: expected one of ce, oe, energy, got 'energi' (did you mean energy?)"),
        (["optimizer.lrr=1"], "optimizer.lrr: no such key (did you mean optimizer.lr?)"),
        (["lr=1"], "lr: no such key (did you mean optimizer.lr?)"),
        (["method=oe", "loss.margin_in=1"], "loss.margin_in: no such key"),
        (["loss=3"], "loss: a group, set one of its keys (alpha, margins,"),
        (["seed.x=3"], "seed: expected one value, got a group"),
        (["epochs=abc"], "epochs: Value 'abc' of type 'str' could not be converted to Integer"),
        (["epochs=-1"], "epochs: expected 0 or more, got -1"),
        (["optimizer.batch_size=0"], "optimizer.batch_size: expected a positive number, got 0"),
        (["optimizer.lr=nan"], "optimizer.lr: expected a positive number, got nan"),
        (["data.name=cifar"], "data.name: expected digits, got 'cifar'"),
        (["loss.margins=x"], "loss.margins: expected auto or fixed, got 'x'"),
        (["loss.margin_in=0"], "margin_in < margin_out"),
        (["loss.alpha=-1"], "alpha: expected a positive finite number, got -1.0"),
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
    file.write_text("a: [1\n")
    with pytest.raises(ConfigError):
        load_config(str(file))
