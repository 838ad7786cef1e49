"""The page about a fine-tuning: it shows what the record holds."""

from __future__ import annotations

from html.parser import HTMLParser

from for_ray.reports.training import render_training
from for_ray.schema import EpochMetrics, FinetuneRun, LossPoint


def make_run(*, val: bool = True, held_out: bool = True) -> FinetuneRun:
    epochs = tuple(
        EpochMetrics(
            epoch=number,
            lr=1e-3 if number < 3 else 1e-4,
            losses={"sup": 3.0 / number, "pse": 5.0 / number},
            curve=tuple(
                LossPoint(step=10 * (number - 1) + step, losses={"sup": 3.0 / number, "pse": 5.0 / number})
                for step in (5, 10)
            ),
            num_matched={"sup": 321, "pse": 654},
            num_dropped={"sup": 0, "pse": 7654},
            val={"base": 0.5, "novel": 0.25, "all": None} if val else None,
            held_out_base=0.125 if held_out else None,
            held_out_pseudo=None,
            seconds=12.0,
        )
        for number in (1, 2, 3)
    )
    return FinetuneRun(
        identity="0" * 64,
        settings={"lr": 1e-3, "dataset": "coco:<b>:x"},
        num_images=1234,
        num_labelled=1111,
        num_held_out=56,
        num_missing=7,
        fingerprint="cafe" * 4,
        selected_epoch=2,
        epochs=epochs,
    )


class Text(HTMLParser):
    """The text of a page, and the addresses in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words, self.addresses = "", []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.words += f" {data.strip()}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_page_says_what_was_trained_and_with_what():
    page = render_training(make_run(), title="Fine-tuning of <x>")
    text = Text(page)
    for said in ("cafecafecafecafe", "of epoch 2 of 3", "1,234", "1,111", "7,654", "Losses", "Learning rate"):
        assert said in text.words
    for said in (
        "Validation: mAP@50",
        "Held-out training images: mAP@50",
        "coco:<b>:x",
        "Fine-tuning of <x>",
    ):
        assert said in text.words
    assert "<b>" not in page
    assert all(address.startswith(("#", "data:")) for address in text.addresses)
    assert page.count("<svg") == 4


def test_towers_are_shown_from_before_the_first_epoch():
    before, after = (
        {"image-to-image mAP": mean, "zero-shot accuracy": share}
        for mean, share in ((0.125, 0.75), (0.5, 0.25))
    )
    epochs = [
        each.model_copy(update={"val": None, "losses": {"classes": 2.0}, "curve": (), "measures": after})
        for each in make_run(held_out=False).epochs
    ]
    epochs[0] = epochs[0].model_copy(update={"measures_before": before, "measures": before})
    changes = {"epochs": tuple(epochs), "settings": {"recipe": "gpr"}}
    text = Text(render_training(make_run().model_copy(update=changes), title="x")).words
    assert text.count("image-to-image mAP") == 2  # in the chart, and above its column
    assert "The encoder that came out is of the last epoch." in text
    for missing in ("mAP@50", "Held out", "held out"):
        assert missing not in text
    table = " ".join(text[text.rindex("seconds to measure") :].split())
    assert table.startswith(
        "seconds to measure 0 – 0.125 0.75 – – 1 2 0.125 0.75 12 0 2 2 0.5 0.25 12 0 3 2 "
    )
    problem = {
        "measures": None,
        "val_problem": "--val: 5 of 6 images cannot be read",
        "num_val_unreadable": 5,
    }
    away = (epochs[0].model_copy(update=problem), epochs[1], epochs[2].model_copy(update=problem))
    text = Text(render_training(make_run().model_copy(update=changes | {"epochs": away}), title="x")).words
    assert "Epoch 1 was not measured: --val: 5 of 6 images cannot be read. Epoch 3 was not measured:" in text
    table = " ".join(text[text.rindex("seconds to measure") :].split())
    assert table.startswith("seconds to measure 0 – 0.125 0.75 – – 1 2 – – 12 0 2 2 0.5 0.25 12 0 3 2 – – ")
    assert "images left out: unreadable, or no vector 5" in " ".join(text.split())
    bare = tuple(each.model_copy(update={"measures": None, "measures_before": None}) for each in epochs)
    text = Text(render_training(make_run().model_copy(update=changes | {"epochs": bare}), title="x")).words
    assert "No --val was given." in text


def test_a_run_without_measures_says_so():
    text = Text(render_training(make_run(val=False, held_out=False), title="x"))
    assert "No --val was given." in text.words
    assert "No images were kept from training." in text.words
