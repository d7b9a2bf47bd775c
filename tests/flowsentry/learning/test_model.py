from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import skops.io
from sklearn.ensemble import RandomForestClassifier
from sklearn.preprocessing import FunctionTransformer

from flowsentry.errors import StoreError
from flowsentry.learning.effects import EffectSizes
from flowsentry.learning.families import FAMILIES, fit
from flowsentry.learning.model import Model

CANDIDATES = [(name, i) for name, family in FAMILIES.items() for i in sorted({0, len(family.candidates) - 1})]
STUDY = ("logistic_regression", "svc", "knn", "decision_tree", "gradient_boosting")


def rows(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    X = random.normal(size=(n, 4)).round(1)
    return X, X[:, 0] - X[:, 3] + random.normal(size=n) > 0


def model_of(name: str, candidate: int = 0, n: int = 300) -> Model:
    family = FAMILIES[name]
    X, y = rows(n)
    effects = EffectSizes(np.array([1.0, np.nan, np.nan, 1.0]), np.array([1.0, 1.0, 1.0, 2.0]))
    return fit(family, family.candidates[candidate], X, y, [1, 0, 0, -1], 0, effects=effects)


def forge(folder: Path, content: bytes) -> None:
    """Put other parameters into a stored model, with their digest."""
    about = json.loads((folder / "model.json").read_text())
    (folder / about["file"]).write_bytes(content)
    about["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "model.json").write_text(json.dumps(about))


@pytest.mark.parametrize(("name", "candidate"), CANDIDATES)
def test_a_stored_model_scores_the_same_bit_by_bit(name: str, candidate: int, tmp_path: Path) -> None:
    model = model_of(name, candidate)
    model.save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    X = np.random.default_rng(2).normal(size=(200, 4)) * 3
    assert (loaded.score(X) == model.score(X)).all()
    assert (loaded.predict(X) == model.predict(X)).all()
    assert (loaded.family, loaded.params, loaded.boundary) == (name, model.params, model.boundary)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_stored_as_the_same_bytes_each_time(name: str, tmp_path: Path) -> None:
    model_of(name).save(tmp_path / "once")
    model_of(name).save(tmp_path / "fitted again")
    Model.load(tmp_path / "once").save(tmp_path / "loaded")
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in sorted(tmp_path.iterdir())]
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize(("name", "candidate"), CANDIDATES)
def test_a_row_scores_the_same_alone_and_in_any_batch(name: str, candidate: int) -> None:
    model = model_of(name, candidate)
    X = np.random.default_rng(2).normal(size=(4500, 4)) * 2
    whole = model.score(X)
    assert whole.shape == (4500,)
    assert np.isfinite(whole).all()
    alone = np.concatenate([model.score(X[i : i + 1]) for i in range(40)])
    assert (alone == whole[:40]).all()
    assert (model.score(X[17:2500]) == whole[17:2500]).all()
    assert (model.score(np.asfortranarray(X)) == whole).all()


@pytest.mark.parametrize("name", STUDY)
def test_predict_is_the_estimators_own(name: str) -> None:
    X = np.random.default_rng(2).normal(size=(500, 4))
    for candidate in range(len(FAMILIES[name].candidates)):
        model = model_of(name, candidate, 120)
        assert (model.predict(X) == model.estimator.predict(X).astype(bool)).all()


def test_purer_and_larger_leaves_score_higher_without_end() -> None:
    X = np.repeat([[0.0], [1.0], [2.0]], [20, 200, 2000], axis=0)
    y = X[:, 0] > 0
    model = fit(FAMILIES["decision_tree"], {"max_depth": 3, "min_samples_leaf": 1, "criterion": "gini"}, X, y, [0], 0)
    benign, malicious = model.score(np.array([[0.0], [1.0]]))
    assert benign == pytest.approx(np.log(0.5 / 20.5))
    assert malicious == pytest.approx(np.log(2200.5 / 0.5))


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="4 features"):
        model_of("tails").score(np.zeros((2, 5)))


def test_no_rows_give_no_scores() -> None:
    assert model_of("svc").score(np.zeros((0, 4))).shape == (0,)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bytes_of_a_model_do_not_depend_on_the_release_of_python(name: str, tmp_path: Path) -> None:
    model_of(name).save(tmp_path)
    (stored,) = (path for path in tmp_path.iterdir() if path.name != "model.json")
    with zipfile.ZipFile(stored) as archive:
        entries = archive.infolist()
    assert entries
    # of streamed entries, and of compressed ones, the bytes have changed between releases
    assert all((entry.compress_type, entry.flag_bits, entry.extra) == (0, 0, b"") for entry in entries)
    assert all(entry.extract_version <= zipfile.DEFAULT_VERSION for entry in entries)


@pytest.mark.parametrize("name", FAMILIES)
def test_garbage_is_a_store_error(name: str, tmp_path: Path) -> None:
    model_of(name).save(tmp_path)
    forge(tmp_path, b"\x80\x04garbage")
    with pytest.raises(StoreError, match="not a stored model"):
        Model.load(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_altered_file_is_a_store_error(name: str, tmp_path: Path) -> None:
    model_of(name).save(tmp_path)
    stored = tmp_path / json.loads((tmp_path / "model.json").read_text())["file"]
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(bytes(content))
    with pytest.raises(StoreError, match="altered"):
        Model.load(tmp_path)


@pytest.mark.parametrize(
    "about",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "family": "knn", "params": {}, "features": 4, "boundary": 0}',
        '{"format": 1, "family": "os", "params": {}, "features": 4, "boundary": 0}',
        '{"format": 1, "family": "knn", "params": 3, "features": 4, "boundary": 0}',
    ],
)
def test_a_damaged_description_is_a_store_error(about: str, tmp_path: Path) -> None:
    model_of("knn").save(tmp_path)
    (tmp_path / "model.json").write_text(about)
    with pytest.raises(StoreError):
        Model.load(tmp_path)


def test_a_missing_folder_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        Model.load(tmp_path / "nowhere")


def test_another_version_of_scikit_learn_is_named(tmp_path: Path) -> None:
    model_of("knn").save(tmp_path)
    about = tmp_path / "model.json"
    stored = json.loads(about.read_text())
    about.write_text(json.dumps({**stored, "scikit_learn": "0.1"}))
    with pytest.raises(StoreError, match=r"scikit-learn 0\.1"):
        Model.load(tmp_path)


def test_a_type_that_no_model_of_ours_has_is_refused_before_it_is_made(tmp_path: Path) -> None:
    model = model_of("logistic_regression")
    model.save(tmp_path)
    model.estimator.intruder = FunctionTransformer(func=shutil.rmtree)
    forge(tmp_path, skops.io.dumps(model.estimator))
    with pytest.raises(StoreError, match="Untrusted types"):
        Model.load(tmp_path)


def test_another_estimator_of_trusted_types_is_refused(tmp_path: Path) -> None:
    X, y = rows()
    model_of("decision_tree").save(tmp_path)
    forge(tmp_path, skops.io.dumps(RandomForestClassifier(2).fit(X, y.astype(np.int8))))
    with pytest.raises(StoreError, match="RandomForestClassifier instead of decision_tree"):
        Model.load(tmp_path)


def test_a_tree_whose_walk_would_leave_its_nodes_or_never_end_is_refused(tmp_path: Path) -> None:
    for family, field, value in (
        ("decision_tree", "left_child", 10**6),
        ("decision_tree", "right_child", 0),
        ("decision_tree", "feature", 77),
        ("gradient_boosting", "left", 10**6),
        ("gradient_boosting", "feature_idx", 77),
    ):
        folder = tmp_path / f"{family}-{field}"
        model = model_of(family)
        model.save(folder)
        forge(folder, _with_other_nodes((folder / "model.skops").read_bytes(), tmp_path / "work", field, value))
        with pytest.raises(StoreError, match="points outside"):
            Model.load(folder)


def _with_other_nodes(content: bytes, work: Path, field: str, value: int) -> bytes:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "old.skops").write_bytes(content)
    with zipfile.ZipFile(work / "old.skops") as old, zipfile.ZipFile(work / "new.skops", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith(".npy"):
                (work / "array.npy").write_bytes(data)
                array = np.load(work / "array.npy", allow_pickle=False)
                if array.dtype.names and field in array.dtype.names:
                    array[field][0] = value
                    np.save(work / "array.npy", array)
                    data = (work / "array.npy").read_bytes()
            new.writestr(name, data)
    return (work / "new.skops").read_bytes()


def test_support_vectors_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    model = model_of("svc")
    model.save(tmp_path)
    model.estimator._n_support = model.estimator._n_support + 1000
    forge(tmp_path, skops.io.dumps(model.estimator))
    with pytest.raises(StoreError, match="points outside"):
        Model.load(tmp_path)
