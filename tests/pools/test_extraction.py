"""Features of images on disk: what is in them, what is left out, and that who makes them when does not show."""

import os
import time

import numpy as np
import processes
import pytest
import torch
from extractions import BATCH, SHARD, contents, folder_of, network, small

from oodkern.data import ArraySet, DataError, FolderSet, SampleSet
from oodkern.data.shards import Shards, ShardSet
from oodkern.pools.extraction import Extraction, fingerprint, image_keys
from oodkern.pools.store import FeatureStore, PoolError
from oodkern.processes import ALONE, Elsewhere, Processes


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes of the tests have, so that products are summed in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("images") / "all", 37)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_pool_holds_the_features_in_order(images, tmp_path, dtype):
    made = network().train()
    made.model[1].eval()  # frozen by a user
    name = str(dtype).removeprefix("torch.")
    pool = small(made, images, tmp_path / "pool", dtype=name, source="a folder", facts={"run": "r"})
    assert [module.training for module in made.model] == [True, False, *[True] * 4]
    made.eval()
    indices = torch.arange(37)
    with torch.no_grad():
        expected = made.features(images.images(indices))
    assert pool.dtype == dtype
    assert (len(pool), pool.dimension, len(pool.shards)) == (37, 216, 4)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(pool.rows(indices).float(), expected, **tolerance)
    assert pool.keys(indices) == [os.path.realpath(path) for path in images.paths]
    assert torch.equal(pool.head[0], made.head.weight)
    assert torch.equal(pool.head[1], made.head.bias)
    assert (pool.fingerprint, pool.source, pool.facts["run"]) == (fingerprint(made), "a folder", "r")
    logits = pool.rows(indices).float() @ pool.head[0].T + pool.head[1]
    torch.testing.assert_close(logits, made(images.images(indices)), rtol=0.02, atol=0.05)


def test_a_fingerprint_is_of_what_makes_features():
    made = network()
    before = fingerprint(made)
    assert before == fingerprint(network())
    with torch.no_grad():
        made.head.weight += 1
        made.head.bias += 1
    assert fingerprint(made) == before
    made.model[0].to(memory_format=torch.channels_last)
    assert fingerprint(made) == before
    seen = {before}
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if not name.startswith("model.5."):
                value[(0,) * value.dim()] += 1
                seen.add(fingerprint(made))
    assert len(seen) == 1 + 2 + 5 + 2, "weights, BatchNorm's weights and buffers, mean and std"
    assert fingerprint(made.double()) not in seen


def test_keys_of_each_kind(images, tmp_path):
    link = tmp_path / "link.png"
    link.symlink_to(images.paths[3])
    linked = FolderSet([link, images.paths[1]], torch.full((2,), -1), size=8)
    assert list(image_keys(linked)) == [os.path.realpath(images.paths[i]) for i in (3, 1)]
    assert list(image_keys(images, torch.tensor([5, 2]))) == [os.path.realpath(images.paths[i]) for i in (5, 2)]
    places = (np.zeros(2, np.int32), np.array([512, 2048]), np.array([10, 10]))
    in_tar = ShardSet(Shards([tmp_path / "a.tar"]), places, torch.full((2,), -1))
    assert list(image_keys(in_tar)) == [f"{os.path.realpath(tmp_path)}/a.tar:{at}" for at in (512, 2048)]
    array = ArraySet(torch.arange(2 * 12, dtype=torch.uint8).view(2, 3, 2, 2), torch.full((2,), -1))
    first, second = image_keys(array)
    assert first != second
    assert first.startswith("pixels:")
    assert list(image_keys(array, torch.tensor([1]))) == [second]
    unknown = SampleSet([(torch.rand(3, 8, 8), 0)] * 3)
    with pytest.raises(PoolError, match="images: expected a set that tells its images apart, which a SampleSet does"):
        list(image_keys(unknown))
    pool = small(network(), unknown, tmp_path / "pool")
    assert len(pool) == 3
    assert not pool.has_keys


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out(tmp_path, workers):
    made = network()
    images = folder_of(tmp_path / "images", 37, damaged={13})
    pool = small(made, images, tmp_path / "pool", dtype="float32", workers=workers)
    there = torch.tensor([i for i in range(37) if i != 13])
    assert pool.keys(torch.arange(36)) == list(image_keys(images, there))
    assert [shard.rows for shard in pool.shards] == [10, 9, 10, 7]
    assert images.damage.found == [13]
    with torch.no_grad():
        expected = made.eval().features(images.readable(there)[0])
    torch.testing.assert_close(pool.rows(torch.arange(36)), expected, rtol=1e-5, atol=1e-6)


def test_too_many_unreadable_images_are_an_error(tmp_path):
    """Also where a process that was killed had found some of them."""
    images = folder_of(tmp_path / "images", 37, damaged={2, 33})
    pool = tmp_path / "pool"
    with pytest.raises(DataError, match="2 of 37 image files cannot be read, and more than 1 "):
        small(network(), images, pool)
    assert (pool / "shard-00002.json").exists()
    again = FolderSet(images.paths, images.labels, size=8)
    with pytest.raises(DataError, match=f"{pool}: 2 of 37 images could not be read, and more than 1 are an error; "):
        small(network(), again, pool)
    assert again.damage.found == [33]
    with pytest.raises(DataError, match="the pool is not complete: 4 of 4 shards are there"):
        FeatureStore.open(pool)


def test_beyond_float16(images, tmp_path):
    made = network(scale=1e6)
    with pytest.raises(PoolError) as raised:
        small(made, images, tmp_path / "pool")
    assert str(raised.value).startswith(f"{os.path.realpath(images.paths[0])}: a feature of ")
    assert str(raised.value).endswith("is beyond the range of float16 (65,504); take bfloat16")
    assert small(made, images, tmp_path / "wide", dtype="bfloat16").rows(torch.arange(37)).isfinite().all()
    with torch.no_grad():
        made.model[1].bias[:] = float("nan")
    with pytest.raises(PoolError, match=r"000.png: its features are not finite"):
        small(made, images, tmp_path / "none", dtype="bfloat16")


class Stopping(FolderSet):
    """Images at one of which Ctrl-C comes."""

    def readable(self, indices):
        if self.stop in indices:
            raise KeyboardInterrupt
        return super().readable(indices)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_made_is_not_made_again(images, tmp_path, workers):
    """Batches end at the ends of shards, and so bytes are those of one that nothing disturbs."""
    made = network()
    small(made, images, tmp_path / "whole")
    stopping = Stopping(images.paths, images.labels, size=8)
    stopping.stop = 25
    with pytest.raises(KeyboardInterrupt):
        small(made, stopping, tmp_path / "pool")
    assert not any(module.training != network().training for module in made.modules())
    with pytest.raises(DataError):
        FeatureStore.open(tmp_path / "pool")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pool").glob("shard-*")}
    assert {name[:11] for name in before} == {"shard-00000", "shard-00001"}
    work = Extraction(made, images, tmp_path / "pool", shard_rows=SHARD, batch_size=BATCH, workers=workers)
    assert (work.missing, work.rows, work.whole) == ([2, 3], 17, False)
    state = torch.random.get_rng_state()
    work.run()
    assert torch.equal(state, torch.random.get_rng_state())
    for name in before:
        path = tmp_path / "pool" / name
        assert not path.exists() or path.stat().st_mtime_ns == before[name], name
    assert contents(tmp_path / "pool") == contents(tmp_path / "whole")
    again = Extraction(made, images, tmp_path / "pool", shard_rows=SHARD, batch_size=BATCH)
    assert (again.missing, again.whole) == ([], True)


def test_another_plan_is_an_error(images, tmp_path):
    small(network(), images, tmp_path)
    before = contents(tmp_path)
    other = network()
    with torch.no_grad():
        other.model[0].bias += 1
    fewer = images.select(torch.arange(36))
    renamed = images.select(torch.arange(36, -1, -1))
    for given, made, options, word in (
        (images, network(), {"dtype": "float32"}, "dtype"),
        (images, network(), {"shard_rows": 5}, "shard_rows|rows a shard"),
        (images, other, {}, "fingerprint"),
        (images, network(), {"source": "elsewhere"}, "source"),
        (fewer, network(), {}, "rows|shape"),
        (renamed, network(), {}, "images|facts"),
    ):
        with pytest.raises(PoolError, match=word):
            small(made, given, tmp_path, **options)
    assert contents(tmp_path) == before
    small(network(), images, tmp_path, facts={"run": "moved", "checkpoint": "best"})
    assert contents(tmp_path) == before, "where the model lay is not in the plan"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype: expected one of float16, bfloat16, float32, got 'float64'"),
        ({"shard_rows": 0}, "shard_rows: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"workers": -1}, "workers: expected"),
    ],
)
def test_arguments_are_looked_at_first(images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        small(network(), images, tmp_path / "pool", **options)
    with pytest.raises(ValueError, match="images: expected one at least"):
        small(network(), images.select(torch.arange(0)), tmp_path / "pool")
    with pytest.raises(TypeError, match="classifier: expected"):
        small(network().model, images, tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def of_this_process():
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())


class Slow(FolderSet):
    """Images of which a process other than the first takes its time, and one that ends it."""

    stop = -1

    def readable(self, indices):
        if torch.distributed.get_rank():
            time.sleep(0.05)
        if self.stop in indices:
            raise DataError("image: no image")
        return super().readable(indices)


def in_two(paths, folder):
    """A pool; then, of another, an error of the second process that the first hears of while it works or waits."""
    images = Slow(paths, torch.full((len(paths),), -1), size=8)
    of = of_this_process()
    pool = small(network(), images, f"{folder}/two", processes=of)
    images.stop = 13
    with pytest.raises(Elsewhere if of.first else DataError):
        small(network(), images, f"{folder}/failed", processes=of)
    torch.distributed.barrier()
    images.stop = -1
    again = small(network(), images, f"{folder}/failed", processes=of)
    return len(pool), len(again)


def test_two_processes_make_the_same_pool(images, tmp_path):
    small(network(), images, tmp_path / "one")
    assert processes.run(in_two, 2, list(images.paths), str(tmp_path)) == [(37, 37)] * 2
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert contents(tmp_path / "failed") == contents(tmp_path / "one")
    assert ALONE.count == 1
