"""J-HMDB in both its forms, own folders, the catalogue: what is bad is reported and shifts nothing."""

import csv
import hashlib
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
from video_files import grey_steps, write_video

from nlutils.paths import data_root, project_root
from nlutils.video import catalogue, jhmdb
from nlutils.video.cache import file_digest
from nlutils.video.catalogue import data_set, describe_source, open_clips
from nlutils.video.decoding import decode
from nlutils.video.folder import check_folder, open_folder, report_folder, study_folds, weak_classes
from nlutils.video.jhmdb import open_jhmdb, verify
from nlutils.video.labels import assign_folds, group_of

CORE8 = ("clap", "jump", "pick", "pullup", "sit", "stand", "swing_baseball", "wave")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NLUTILS_CLIPS", raising=False)


@pytest.fixture(scope="module")
def shared():
    folder = data_root() / "jhmdb21"
    if not (folder / "labels.csv").is_file():
        pytest.skip("no folder jhmdb21 in $NLUTILS_DATA")
    return folder


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


# ---- the facts ----


def test_committed_facts_of_jhmdb():
    rows = _rows(project_root() / "data" / "catalogue" / "jhmdb21.csv")
    assert len(rows) == 793
    assert len({row["clip"] for row in rows}) == len({row["original_sha256"] for row in rows}) == 793
    assert len({row["class"] for row in rows}) == 21
    core8 = [row for row in rows if row["core8"] == "1"]
    assert len(core8) == 296
    assert tuple(sorted({row["class"] for row in core8})) == CORE8
    folds = {}
    for row in rows:
        folds.setdefault(row["group"], set()).add(row["fold"])
    assert all(len(seen) == 1 for seen in folds.values())
    assert {row["fold"] for row in rows} == set("01234")


def test_prepared_copy_agrees_with_the_facts(shared):
    facts = _rows(project_root() / "data" / "catalogue" / "jhmdb21.csv")
    labels = _rows(shared / "labels.csv")
    assert [row["clip"] for row in facts] == [row["path"].split("/")[-1][:-4] for row in labels]
    for column, other in (("class",) * 2, ("group",) * 2, ("fold", "cv_fold"), ("frames", "n_frames")):
        assert [row[column] for row in facts] == [row[other] for row in labels]
    assert verify("jhmdb21") == []
    for row in labels[::20]:
        frames = decode(shared / row["path"])
        assert frames.shape == (int(row["n_frames"]), 120, 160, 3)


def test_an_original_and_its_prepared_copy_show_the_same(shared):
    """The one original in odd-clips: recognised by content and by name, twice the size, the same pictures."""
    path = data_root() / "odd-clips" / "jhmdb_header48_frames40.avi"
    if not path.is_file():
        pytest.skip("no folder odd-clips in $NLUTILS_DATA")
    rows = _rows(project_root() / "data" / "catalogue" / "jhmdb21.csv")
    (row,) = (row for row in rows if row["original_sha256"] == file_digest(path))
    assert row["clip"] == "brush_hair_g290_c01"
    name = b"April_09_brush_hair_u_nm_np1_ba_goo_0.avi"
    assert row["original_name_sha256"] == hashlib.sha256(name).hexdigest()
    original = decode(path, (120, 160)).astype(int)
    prepared = decode(shared / "videos" / row["class"] / f"{row['clip']}.mp4").astype(int)
    assert original.shape == prepared.shape == (40, 120, 160, 3)
    assert np.abs(original - prepared).mean() < 3


# ---- small copies of both forms ----


def _small_jhmdb(root):
    """Twelve clips of four classes, two of them in core8, as both forms; returns the table of facts."""
    facts, labels, sums = [], [], []
    for number in range(12):
        kind = ("catch", "clap", "jump", "walk")[number % 4]
        clip, group = f"{kind}_g{number // 4:03d}_c01", f"g{number // 4:03d}"
        small = root / "prepared" / "jhmdb21" / "videos" / kind / f"{clip}.mp4"
        large = root / "original" / "JHMDB_video" / "ReCompress_Videos" / kind / f"Some_Film_{number}.avi"
        for path, scale in ((small, 1), (large, 2)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, grey_steps(3 + number, 24 * scale, 32 * scale, offset=10 * number))
        common = {"class": kind, "group": group, "core8": int(kind in CORE8)}
        labels.append({"path": f"videos/{kind}/{clip}.mp4", **common, "cv_fold": number // 4})
        facts.append(
            {"clip": clip, **common, "fold": number // 4, "original_sha256": file_digest(large)}
            | {"original_name_sha256": hashlib.sha256(large.name.encode()).hexdigest()}
        )
        sums.append(f"{file_digest(small)}  {labels[-1]['path']}\n")
    folder = root / "prepared" / "jhmdb21"
    _table(folder / "labels.csv", labels)
    (folder / "SHA256SUMS").write_text("".join(sums))
    write_video(root / "original/JHMDB_video/ReCompress_Videos/jump/unlisted.avi", grey_steps(2))
    _table(root / "facts.csv", facts)
    return root / "facts.csv"


def _contents(clips):
    return [(clip.name, clips.classes[clip.label], clip.group, clip.fold) for clip in clips.clips]


def test_both_forms_give_the_same_set(tmp_path):
    facts = _small_jhmdb(tmp_path)
    prepared = open_jhmdb("core8", root=tmp_path / "prepared", size=(24, 32))
    original = open_jhmdb("core8", root=tmp_path / "original", size=(24, 32), facts=facts)
    assert prepared.source == "J-HMDB core8, prepared copy, 6 clips, 32 x 24"
    assert original.source == "J-HMDB core8, original files, 6 clips, 32 x 24"
    assert prepared.classes == original.classes == ("clap", "jump")
    assert _contents(prepared) == _contents(original)
    assert _contents(prepared)[1] == ("jump_g000_c01", "jump", "g000", 0)
    for one, other in zip(prepared.clips, original.clips, strict=True):
        assert one.frames().shape == other.frames().shape
        np.testing.assert_allclose(one.frames(), other.frames(), atol=40)
        np.testing.assert_allclose(one.frames().mean((1, 2, 3)), other.frames().mean((1, 2, 3)), atol=4)
    whole = open_jhmdb("jhmdb21", root=tmp_path / "original", size=(24, 32), facts=facts)
    assert len(whole) == 12
    assert whole.classes == ("catch", "clap", "jump", "walk")
    train, test = prepared.split(2)
    assert {clip.group for clip in test} == {"g002"}
    assert not {clip.group for clip in train} & {clip.group for clip in test}
    assert pickle.loads(pickle.dumps(prepared.clips[0])).frames().dtype == np.uint8


@pytest.mark.parametrize("form", ["prepared", "original"])
def test_bad_clips_are_left_out_and_shift_nothing(tmp_path, form):
    facts = _small_jhmdb(tmp_path)
    root = tmp_path / form
    options = {"root": root, "size": (24, 32), "facts": facts}
    good = open_jhmdb("jhmdb21", **options)
    files = {clip.name: clip.read.args[0] for clip in good.clips}
    files["catch_g000_c01"].unlink()
    files["catch_g001_c01"].write_bytes(b"")
    files["catch_g002_c01"].write_bytes(b"no video")  # the whole of the first class
    shutil.copy(files["walk_g000_c01"], files["jump_g001_c01"])  # a video, and not the published one
    left = open_jhmdb("jhmdb21", **options)
    lost = {"catch_g000_c01", "catch_g001_c01", "catch_g002_c01", "jump_g001_c01"}
    assert left.classes == good.classes
    assert _contents(left) == [row for row in _contents(good) if row[0] not in lost]
    assert len(left.faults) == 4
    assert "8 clips (4 left out)" in left.source
    assert len(verify("jhmdb21", root=root, facts=facts)) == 4
    if form == "prepared":
        causes = {fault.path.rsplit("/", 1)[-1]: fault.cause for fault in left.faults}
        assert "no such file" in causes["catch_g000_c01.mp4"]
        assert "empty" in causes["catch_g001_c01.mp4"]
        assert "not a video" in causes["catch_g002_c01.mp4"]
        assert "SHA-256" in causes["jump_g001_c01.mp4"]


def test_errors_of_a_set_as_a_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"J-HMDB is not in .*make data.*NLUTILS_DATA"):
        open_jhmdb("core8", root=tmp_path)
    with pytest.raises(ValueError, match="name='core9'"):
        open_jhmdb("core9", root=tmp_path)
    _small_jhmdb(tmp_path)
    table = tmp_path / "prepared" / "jhmdb21" / "labels.csv"
    rows = _rows(table)
    _table(table, [row | {"group": "g000"} for row in rows])
    with pytest.raises(ValueError, match=r"groups lie in two folds \(g000\)"):
        open_jhmdb("core8", root=tmp_path / "prepared")
    _table(table, [row | {"cv_fold": "x"} for row in rows])
    with pytest.raises(ValueError, match="fold 'x' of videos/"):
        open_jhmdb("core8", root=tmp_path / "prepared")
    _table(table, [{"path": row["path"]} for row in rows])
    with pytest.raises(ValueError, match=r"labels.csv: no column 'class'.*\['path'\]"):
        open_jhmdb("core8", root=tmp_path / "prepared")


# ---- folders of one's own ----


def _own_folder(root, groups=5):
    for kind in ("fall", "rise"):
        for number in range(groups):
            path = root / kind / f"take{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, grey_steps(3, offset=20 * number + (kind == "rise")))
    return root


def test_folder_without_labels(tmp_path, capsys):
    root = _own_folder(tmp_path / "mine")
    assert check_folder(root) == []
    clips = open_folder(root)
    assert (clips.name, clips.classes, len(clips)) == ("mine", ("fall", "rise"), 10)
    assert clips.source == "folder mine, 10 clips, 160 x 120"
    assert clips.clips[7].name == "rise/take2.mp4"
    assert clips.clips[7].group == "take2"
    assert clips.clips[7].frames().shape == (3, 120, 160, 3)
    for fold in range(5):
        _, test = clips.split(fold)
        assert sorted(clip.label for clip in test) == [0, 1]
        assert len({clip.group for clip in test}) == 1
    assert report_folder(root) == 0
    assert capsys.readouterr().out == f"{root}: 10 clips in 2 classes and 5 folds, no faults\n"


def test_folder_with_labels(tmp_path):
    root = _own_folder(tmp_path / "mine")
    rows = [
        {
            "path": f"{kind}/take{number}.mp4",
            "class": other,
            "group": f"day{number // 2}",
            "fold": number // 2,
        }
        for number in range(4)
        for kind, other in (("fall", "down"), ("rise", "up"))
    ]
    _table(root / "labels.csv", rows)
    clips = open_folder(root)
    assert clips.classes == ("down", "up")
    assert _contents(clips)[0] == ("fall/take0.mp4", "down", "day0", 0)
    assert len(clips) == 8
    causes = {fault.path.removeprefix(f"{root}/"): fault.cause for fault in check_folder(root)}
    assert causes == {
        "fall/take4.mp4": "labels.csv does not list it",
        "rise/take4.mp4": "labels.csv does not list it",
    }


def test_check_folder_finds_every_fault(tmp_path, capsys):
    root = _own_folder(tmp_path / "mine", groups=2)
    (root / "fall" / "empty.mp4").write_bytes(b"")
    (root / "fall" / "notes.docx").write_bytes(b"x")
    (root / "empty_class").mkdir()
    (root / ".hidden").mkdir()
    (root / "rise" / "more").mkdir()
    shutil.copy(root / "rise" / "take0.mp4", root / "rise" / "more" / "deep.mp4")
    shutil.copy(root / "rise" / "take0.mp4", root / "loose.MP4")
    shutil.copy(root / "rise" / "take0.mp4", root / "fall" / "zz_copy.MP4")
    causes = {fault.path.removeprefix(f"{root}/"): fault.cause for fault in check_folder(root)}
    assert causes == {
        "empty_class": "the class has no clips",
        "fall/empty.mp4": "the file is empty (0 bytes)",
        "fall/notes.docx": "not used: .docx is not a video's suffix",
        "loose.MP4": "not used: it lies in no class's folder",
        "rise/more/deep.mp4": "not used: it lies in a folder inside a class's folder",
        "rise/take0.mp4": "the same content as fall/zz_copy.MP4, in another class (fall)",
    }
    assert report_folder(root) == 1
    assert capsys.readouterr().out.endswith(f"6 faults in {root}\n")
    assert [fault.cause for fault in open_folder(root).faults] == ["the file is empty (0 bytes)"]


def test_check_folder_finds_every_fault_of_labels(tmp_path):
    root = _own_folder(tmp_path / "mine", groups=2)
    good = {"class": "fall", "group": "a", "fold": "0"}
    rows = [
        {"path": "fall/take0.mp4", **good},
        {"path": "fall/take0.mp4", **good},
        {"path": "fall/gone.mp4", **good},
        {"path": "../mine/fall/take1.mp4", **good},
        {"path": "fall/take1.mp4", **good | {"fold": "1"}},
        {"path": "rise/take0.mp4", **good | {"class": ""}},
        {"path": "rise/take1.mp4", **good | {"fold": "first"}},
        {"path": "", **good},
    ]
    _table(root / "labels.csv", rows)
    causes = {fault.cause for fault in check_folder(root)}
    for part in (
        "labels.csv lists it twice",
        "labels.csv lists it, and there is no such file",
        "labels.csv must give paths from the folder itself",
        "has no class",
        "its fold in labels.csv is 'first'",
        "has no path (class 'fall')",
        "group a lies in the folds [0, 1]",
    ):
        assert sum(part in cause for cause in causes) == 1, part
    with pytest.raises(ValueError, match=r"groups lie in two folds \(a\)"):
        open_folder(root)


def test_folders_that_cannot_be_used(tmp_path, capsys):
    (fault,) = check_folder(tmp_path / "nowhere")
    assert fault.cause == "there is no such folder"
    assert report_folder(tmp_path / "nowhere") == 1
    assert "nowhere: there is no such folder" in capsys.readouterr().out
    with pytest.raises(NotADirectoryError, match="nowhere: there is no such folder"):
        open_folder(tmp_path / "nowhere")
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "bad.avi").write_bytes(b"bad")
    write_video(flat / "good.avi", grey_steps(2))
    causes = {fault.path: fault.cause for fault in check_folder(flat)}
    assert causes.keys() == {str(flat), str(flat / "bad.avi")}
    assert "sub-folders, one for each class" in causes[str(flat)]
    with pytest.raises(ValueError, match="flat: no clip that can be used"):
        open_folder(flat)
    single = _own_folder(tmp_path / "single", groups=1)
    with pytest.raises(ValueError, match="single: clips in one fold only"):
        open_folder(single)
    assert any("fewer than two folds" in fault.cause for fault in check_folder(single))
    (single / "labels.csv").write_bytes(b"\xff\xfe\x00")
    assert "not a CSV file in UTF-8" in check_folder(single)[0].cause


def test_a_folder_without_two_classes_to_tell_apart_is_a_fault(tmp_path):
    root = _own_folder(tmp_path / "mine", groups=2)
    shutil.rmtree(root / "rise")
    (fault,) = check_folder(root)
    assert fault.path == str(root)
    assert fault.cause.startswith("one class only, 'fall'")
    with pytest.raises(ValueError, match="mine: one class only"):
        study_folds(root)


def test_a_class_that_cannot_be_learned_and_tested_is_a_fault(tmp_path, capsys):
    root = _own_folder(tmp_path / "mine", groups=3)
    for number in (1, 2):
        (root / "rise" / f"take{number}.mp4").unlink()
    (fault,) = check_folder(root)
    assert fault.path == str(root / "rise")
    assert fault.cause.startswith("all its clips lie in fold 0, so it is tested only by networks that never")
    assert study_folds(root) == [0, 1, 2]
    write_video(root / "rise" / "take2.mp4", grey_steps(5))
    assert report_folder(root) == 0
    assert "5 clips in 2 classes and 3 folds, no faults\n5 folds are usual" in capsys.readouterr().out


def test_weak_classes_are_those_of_no_clips_or_of_one_fold():
    weak = weak_classes(["a", "b", "c"], [("a", 0), ("a", 1), ("b", 1), ("b", 1)])
    assert weak.keys() == {"b", "c"}
    assert "fold 1" in weak["b"]
    assert weak["c"] == "the class has no clips"
    assert weak_classes(["a", "b"], [("a", 0), ("b", 0)]) == {}


def test_groups_from_names():
    assert group_of("v_BaseballPitch_g01_c02") == "g01"
    assert group_of("person07_walking_d1") == "person07"
    assert group_of("dog_walks") == "dog_walks"
    assert group_of("jumping") == "jumping"


def test_assigned_folds_keep_groups_whole_and_classes_even():
    rng = np.random.default_rng(0)
    groups = [f"g{number}" for number in rng.integers(0, 60, 600)]
    kinds = [f"class {number}" for number in rng.integers(0, 4, 600)]
    folds = assign_folds(kinds, groups)
    assert folds == assign_folds(kinds, groups)
    seen = {}
    for group, fold in zip(groups, folds, strict=True):
        assert seen.setdefault(group, fold) == fold
    counts = Counter(zip(kinds, folds, strict=True))
    assert all(22 <= counts[f"class {kind}", fold] <= 38 for kind in range(4) for fold in range(5))
    assert assign_folds(["a", "a", "b"], ["x", "y", "x"]) == [0, 1, 0]
    assert assign_folds([], []) == []


# ---- the catalogue ----


def test_auto_means_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(jhmdb, "project_root", lambda: tmp_path / "no checkout")
    monkeypatch.setattr(catalogue, "project_root", lambda: tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("NLUTILS_DATA", str(tmp_path / "empty"))
    assert describe_source().startswith("The clips are procedural")
    assert "`make data`" in describe_source()
    _small_jhmdb(tmp_path)
    monkeypatch.setenv("NLUTILS_DATA", str(tmp_path / "prepared"))
    assert describe_source() == "The clips are J-HMDB core8 (prepared copy, 6 clips), found on this machine."
    assert open_clips().source == "J-HMDB core8, prepared copy, 6 clips, 160 x 120"
    monkeypatch.setenv("NLUTILS_CLIPS", "jhmdb21")
    assert len(open_clips()) == 12
    assert describe_source().endswith("(prepared copy, 12 clips), as NLUTILS_CLIPS says.")
    monkeypatch.setenv("NLUTILS_CLIPS", "procedural")
    assert describe_source() == "The clips are procedural (made here, not filmed), as NLUTILS_CLIPS says."
    _own_folder(tmp_path / "mine")
    monkeypatch.setenv("NLUTILS_CLIPS", "mine")
    assert open_clips().name == "mine"
    assert "folder mine" in describe_source()
    assert open_clips(tmp_path / "mine", size=(20, 30)).source.endswith("30 x 20")
    monkeypatch.setenv("NLUTILS_CLIPS", "mien")
    with pytest.raises(ValueError, match="NLUTILS_CLIPS='mien' is not known"):
        open_clips()
    with pytest.raises(ValueError, match="name='core9' is not known"):
        open_clips("core9")
    with pytest.raises(ValueError, match=r"\['size'\] belong to one data set"):
        open_clips(size=(20, 30))


def test_what_was_fetched_is_found_beside_a_data_folder_without_it(tmp_path, monkeypatch):
    _small_jhmdb(tmp_path)
    (tmp_path / "data").mkdir()
    shutil.move(tmp_path / "original", tmp_path / "data" / "downloads")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("NLUTILS_DATA", str(tmp_path / "empty"))
    monkeypatch.setattr(jhmdb, "project_root", lambda: tmp_path)
    assert jhmdb.find().kind == "original files"


def test_procedural_clips_open():
    clips = open_clips("procedural", count=60, frames=4, size=16)
    assert len(clips) == 60
    assert clips.clips[0].frames().shape == (4, 16, 16, 3)


def test_catalogue_states_terms_and_checksum():
    entry = data_set("core8")
    assert entry is data_set("jhmdb21")
    assert entry.address == "https://files.is.tue.mpg.de/jhmdb/JHMDB_video.zip"
    assert entry.md5 == "0aca5af988892c8c2afe652a30544b8c"
    assert "research" in entry.terms
    with pytest.raises(ValueError, match="name='procedural' is no data set that can be fetched"):
        data_set("procedural")
