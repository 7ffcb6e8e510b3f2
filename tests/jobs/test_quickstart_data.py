"""The quickstart's preferences follow the ratings, and its training and held-out halves share no text."""

import io
import json
import tarfile

import pytest

from jobs import quickstart_data
from jobs.quickstart_data import COLLECTIONS, MIN_MARGIN, RatedText, make_preferences, read_ratings


@pytest.fixture
def collections() -> dict[str, list[RatedText]]:
    """Makes texts of all lengths, some of them in two collections and some twice in one."""
    rated = [RatedText(f"text {n} " + "word " * (n % 30), float(n % 9 - 4)) for n in range(3000)]
    return {"tweets": rated[:2000], "movies": rated[1900:] + rated[2500:]}


def test_training_and_held_out_preferences_share_no_text(collections):
    train, held_out = make_preferences(collections)
    texts = [{row[side] for row in rows for side in ("chosen", "rejected")} for rows in (train, held_out)]
    assert len(train) > 300
    assert len(held_out) > 50
    assert not texts[0] & texts[1]


def test_the_better_rated_text_is_chosen_by_the_margin(collections):
    ratings = {rated.text: rated.rating for texts in collections.values() for rated in texts}
    train, held_out = make_preferences(collections)
    for row in [*train, *held_out]:
        assert row["margin"] == ratings[row["chosen"]] - ratings[row["rejected"]] >= MIN_MARGIN
    assert make_preferences(collections) == (train, held_out)


def test_means_are_recomputed_from_the_raw_ratings(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name in COLLECTIONS:
            for suffix, text in (("anonDataRatings", "1\t9.9\t0.5\t[1, 2, 4]\n"), ("GroundTruth", "1\t9.9\ta\ttab\n")):
                content = ("\ufeff" + text).encode()
                member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_{suffix}.txt")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with tarfile.open(tmp_path / "sdist.tar.gz", "w:gz") as outer:
        member = tarfile.TarInfo(f"vader/{quickstart_data.RATINGS_ARCHIVE}")
        member.size = len(inner.getvalue())
        outer.addfile(member, io.BytesIO(inner.getvalue()))
    assert read_ratings(tmp_path / "sdist.tar.gz") == {name: [RatedText("a\ttab", 7 / 3)] for name in COLLECTIONS}


def test_what_is_there_is_not_brought_again(tmp_path, monkeypatch):
    def no_download(*_: object) -> None:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(quickstart_data, "download", no_download)
    (tmp_path / "model").mkdir()
    quickstart_data.download_model(tmp_path / "model")
    for name in ("train", "held-out"):
        (tmp_path / name).write_text(json.dumps({}))
    quickstart_data.download_preferences(tmp_path / "train", tmp_path / "held-out")
    with pytest.raises(AssertionError, match="downloaded again"):
        quickstart_data.download_preferences(tmp_path / "train", tmp_path / "absent")
