"""Asking: boxes where the objects are, refining, more like this, thresholds, filters, addresses."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs

import pytest

from for_ray.datasets.pages import CATEGORIES

Box = tuple[float, float, float, float]

MEASURE = """tile => {
    const image = tile.querySelector('img').getBoundingClientRect();
    return [...tile.querySelectorAll('.box')].map(each => {
        const box = each.getBoundingClientRect();
        return {name: each.dataset.name, colour: getComputedStyle(each).borderTopColor, box: [
            (box.left - image.left) / image.width, (box.top - image.top) / image.height,
            (box.right - image.left) / image.width, (box.bottom - image.top) / image.height]};
    });
}"""


def _drawn(tile: Any) -> list[dict[str, Any]]:
    """What is drawn on a tile: names, colours, and boxes as fractions of the image as it is seen."""
    tile.locator(".frame.loaded").wait_for()
    return tile.evaluate(MEASURE)


def _overlap(one: Box, other: Box) -> float:
    """IoU."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def _tile(tab: Any, file_name: str) -> Any:
    return tab.page.locator(f".hit:has(.tile[aria-label*='{file_name}'])")


def _asked(tab: Any, act: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The question that an act of the user sends, and its answer."""
    with tab.page.expect_response(lambda response: response.url.endswith("/search")) as caught:
        act()
    answer = caught.value.json()
    tab.settle()
    return json.loads(caught.value.request.post_data), answer


@pytest.mark.parametrize(
    ("category", "file_name"), [("keyboard", "000028.jpg"), ("wheelchair", "000061.jpg")]
)
def test_box_of_a_hit_lies_on_the_object(tab: Any, served: Any, category: str, file_name: str) -> None:
    tab.open()
    _, answer = _asked(tab, lambda: tab.ask(f"a {category}"))
    [drawn] = _drawn(_tile(tab, file_name))
    assert max(_overlap(drawn["box"], truth) for truth in served.book.truth(file_name, category)) > 0.6
    hit = next(hit for hit in answer["hits"] if hit["uri"].endswith(file_name))
    assert drawn["box"] == pytest.approx(hit["box"], abs=0.012)  # a pixel of the screen


def test_thumbnails_keep_their_proportions(tab: Any) -> None:
    tab.open("?q=a+keyboard")
    ratios = tab.page.locator(".frame.loaded").evaluate_all(
        """frames => frames.map(frame => {
            const image = frame.querySelector('img'), box = image.getBoundingClientRect();
            return [box.width / box.height, image.naturalWidth / image.naturalHeight]; })"""
    )
    assert len(ratios) >= 10
    assert [shown for shown, _ in ratios] == pytest.approx([own for _, own in ratios], rel=0.02)


def test_score_is_there_for_the_mouse_and_for_the_focus(tab: Any) -> None:
    tab.open("?q=a+keyboard")
    caption = tab.tiles.first.locator(".caption")
    visible = "caption => getComputedStyle(caption).opacity === '1'"
    tab.page.mouse.move(0, 0)
    assert caption.evaluate(visible) is False
    tab.tiles.first.hover()
    tab.wait(f"({visible})(document.querySelector('.hit .caption'))")
    tab.page.mouse.move(0, 0)
    tab.page.press("#question", "Escape")  # from the question to the results
    tab.wait(f"({visible})(document.querySelector('.hit .caption'))")
    label = tab.tiles.first.locator(".tile").get_attribute("aria-label")
    assert re.fullmatch(r"1: \S+\.jpg, score 0\.\d{3}", label)
    assert re.search(r"0\.\d{3}", label)[0] in caption.inner_text()


def test_and_gives_each_name_a_colour_and_not_takes_images_away(tab: Any) -> None:
    tab.open("?q=a+bicycle")
    tab.page.click("[data-refine=' AND ']")
    assert tab.page.evaluate("document.activeElement.id") == "question"
    tab.page.keyboard.type("a dog")
    asked, _ = _asked(tab, lambda: tab.page.keyboard.press("Enter"))
    assert asked["text"] == "a bicycle AND a dog"
    first = _drawn(tab.tiles.first)
    assert [each["name"] for each in first] == ["a bicycle", "a dog"]
    assert len({each["colour"] for each in first}) == 2
    legend = tab.page.locator("#legend li")
    assert legend.all_inner_texts() == ["a bicycle", "a dog"]
    dots = legend.locator(".dot").evaluate_all(
        "dots => dots.map(dot => getComputedStyle(dot).backgroundColor)"
    )
    assert dots == [each["colour"] for each in first]

    tab.open("?k=240")
    _, everything = _asked(tab, lambda: tab.ask("a bicycle"))
    tab.page.click("[data-refine=' NOT ']")
    tab.page.keyboard.type("a dog")
    _, answer = _asked(tab, lambda: tab.page.keyboard.press("Enter"))
    found, all_found = ([hit["image_id"] for hit in each["hits"]] for each in (answer, everything))
    assert len(all_found) == 121
    assert 0 < len(found) < 121
    assert [image_id for image_id in all_found if image_id in found] == found
    assert tab.ids() == found[: len(tab.ids())]
    assert tab.page.locator("#legend li").all_inner_texts() == ["a bicycle"]


def test_more_like_an_object(tab: Any) -> None:
    tab.open("?q=a+keyboard")
    tab.tiles.first.locator(".tile").click()
    tab.page.locator(".slot").first.wait_for()
    image_id = int(parse_qs(tab.query()[1:])["image"][0])
    slots = tab.page.locator(".slot-list .slot")
    assert slots.count() == tab.page.locator(".slots .box").count() > 3
    other = tab.page.locator(".slot-list .slot[aria-pressed=false]").first
    slot = other.get_attribute("data-slot")
    other.click()
    chosen = tab.page.locator(f".slots .box[data-slot='{slot}']")
    assert chosen.get_attribute("aria-pressed") == "true"
    asked, answer = _asked(tab, lambda: tab.page.click("[data-do=like]"))
    assert asked["like"] == f"{image_id}:{slot}"
    assert tab.ids()[0] == image_id == answer["hits"][0]["image_id"]
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=0.01)
    assert not tab.page.locator("#viewer").is_visible()
    tab.page.go_back()  # to the open image
    tab.page.locator("#viewer[open]").wait_for()
    tab.settle()
    assert tab.page.input_value("#question") == "a keyboard"


def test_threshold_by_pointer_and_by_keys(tab: Any) -> None:
    tab.open("?q=a+keyboard")
    slider = tab.page.locator("[role=slider]")
    plot = tab.page.locator(".plot").bounding_box()
    tab.page.mouse.move(plot["x"], plot["y"] + 20)
    tab.settle()
    tab.page.mouse.down()
    tab.page.mouse.move(plot["x"] + plot["width"] * 0.75, plot["y"] + 20, steps=4)
    tab.page.mouse.up()
    lowest = float(slider.get_attribute("aria-valuenow"))
    ends = [float(slider.get_attribute(name)) for name in ("aria-valuemin", "aria-valuemax")]
    assert lowest == pytest.approx(0.25 * ends[0] + 0.75 * ends[1], abs=0.005)
    assert float(parse_qs(tab.query()[1:])["min"][0]) == pytest.approx(lowest, abs=1e-4)
    few = _scores(tab)
    assert 0 < len(few) < 60
    assert min(few) >= round(lowest, 3)
    slider.focus()
    tab.page.keyboard.press("PageDown")
    more = _scores(tab)
    assert len(more) > len(few)
    assert more[: len(few)] == few
    tab.page.keyboard.press("Home")
    assert "min" not in parse_qs(tab.query()[1:])
    tab.page.keyboard.press("End")
    assert tab.tiles.count() == 1


def test_one_question_until_more_is_wanted(tab: Any) -> None:
    tab.open("?q=a+keyboard")
    asked = [url for url in tab.requests if url.endswith("/search")]
    assert len(asked) == 1
    assert tab.tiles.count() == 60
    assert tab.page.inner_text("#counted").startswith("The best 60 of 121 images")
    _, answer = _asked(tab, tab.page.locator(".plot").hover)
    assert len(answer["hits"]) == 61
    tab.page.locator("[role=slider]").focus()
    tab.settle()
    assert len([url for url in tab.requests if url.endswith("/search")]) == 2


def test_scores_that_come_in_meanwhile_leave_a_dragged_threshold_alone(tab: Any) -> None:
    waiting = []
    tab.open("?q=a+keyboard")
    tab.page.route("**/search", lambda route: waiting.append(route))
    slider, plot = tab.page.locator("[role=slider]"), tab.page.locator(".plot").bounding_box()
    low, high = (float(slider.get_attribute(name)) for name in ("aria-valuemin", "aria-valuemax"))
    tab.page.mouse.move(plot["x"] + plot["width"] * 0.75, plot["y"] + 20)
    tab.page.mouse.down()
    dragged = slider.get_attribute("aria-valuenow")
    assert float(dragged) == pytest.approx(0.25 * low + 0.75 * high, abs=0.002)
    waiting[0].continue_()
    tab.wait("document.querySelector('[role=slider]').ariaValueText.endsWith('of the 121 images so far')")
    handle = slider.bounding_box()
    assert handle["x"] + handle["width"] / 2 == pytest.approx(plot["x"] + plot["width"] * 0.75, abs=2)
    tab.page.mouse.up()
    assert slider.get_attribute("aria-valuenow") == dragged
    assert float(slider.get_attribute("aria-valuemin")) < low


def test_threshold_lets_pass_what_rises_at_a_later_page(tab: Any) -> None:
    def answer(route: Any) -> None:
        answered = route.fetch()
        body = answered.json()
        if json.loads(route.request.post_data).get("page"):
            body["hits"][0]["score"] = 0.95  # as of an image that was overlooked on the page before
        route.fulfill(response=answered, json=body)

    tab.page.route("**/search", answer)
    tab.open("?q=a+keyboard&k=60&min=0.74")
    tab.wait("document.querySelector('#counted').textContent.includes('score 0.740')")
    *first, risen = _scores(tab)
    assert risen == 0.95
    assert 0 < len(first) < 59
    assert min(first) >= 0.74
    assert float(tab.page.get_attribute("[role=slider]", "aria-valuemax")) == 0.95
    assert tab.page.inner_text("#counted").startswith(f"{len(first) + 1} of 121 images, score 0.740 or more")
    tab.page.press("#question", "Escape")
    for key in ("End", "ArrowLeft", " ", "ArrowRight", "Shift+ "):
        tab.page.keyboard.press(key)
    assert tab.page.inner_text("#selected-count") == "2 selected"
    assert tab.page.evaluate("document.activeElement.dataset.id") == str(tab.ids()[-1])


def _scores(tab: Any) -> list[float]:
    return [float(text) for text in tab.tiles.locator(".caption b").all_text_contents()]


def test_threshold_above_all_says_what_the_best_has(tab: Any) -> None:
    tab.open("?q=a+keyboard&min=0.99")
    assert tab.tiles.count() == 0
    assert re.search(
        r"No image scores 0\.990 or more\s+The best of them has 0\.\d{3}\.", tab.page.inner_text("#state")
    )
    tab.page.click("text=Show all")
    assert tab.tiles.count() >= 60


def test_results_come_in_as_one_scrolls(tab: Any) -> None:
    tab.open("?q=a+keyboard&k=30")
    assert 30 <= tab.tiles.count() < 121
    tab.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    tab.wait("document.querySelectorAll('.hit').length === 121")
    assert len(set(tab.ids())) == 121
    assert sorted(_scores(tab), reverse=True) == _scores(tab)
    assert "121 of 121 images" in tab.page.inner_text("#counted")
    assert tab.page.locator(".hit img[loading=lazy]").count() == 121


def test_last_page_ends_where_the_question_does(tab: Any) -> None:
    """Of 1,000 folded images 900 are there: the next 100 are asked for, and no more, whatever follows."""
    asked = []

    def answer(route: Any) -> None:
        question = json.loads(route.request.post_data)
        asked.append(question["k"])
        answered = route.fetch()
        body = answered.json()
        num_hits = question["k"] if question.get("page") else 900
        hits = (body["hits"] * 15)[:num_hits]
        body["hits"] = hits[:-5] + [{**hit, "score": 0.99} for hit in hits[-5:]]  # the others stay hidden
        route.fulfill(response=answered, json={**body, "next_page": body["next_page"] or "another"})

    tab.page.route("**/search", answer)
    tab.open("?q=a+keyboard&fold=1&min=0.98")
    tab.wait("document.querySelector('#counted').textContent.startsWith('10 of 121')")
    tab.settle()
    assert asked == [60, 100]
    assert tab.page.locator(".banner").count() == 0
    tab.page.click("#export-open")
    assert tab.page.get_attribute("#export [name=count]", "max") == "1000"


def test_filters_and_what_they_leave(tab: Any) -> None:
    tab.open("?q=a+keyboard")
    tab.page.click("#filters-toggle")
    tab.page.fill("[name=glob]", "*/00000?.jpg")
    tab.page.click(".columns >> text=width")
    assert tab.page.input_value("[name=where]") == "width"
    tab.page.fill("[name=where]", "width > 0")
    tab.page.check("[name=fold]")
    asked, answer = _asked(tab, lambda: tab.page.click("#filters [type=submit]"))
    assert asked["filters"] == {"glob": "*/00000?.jpg", "where": "width > 0"}
    assert asked["fold_at"] == 0.935
    assert len(tab.ids()) == len(answer["hits"]) == 10
    assert "hold" in tab.page.inner_text("#state")  # the answer's own reason
    chips = tab.page.locator("#active-filters button")
    assert chips.count() == 3
    _asked(tab, chips.first.click)
    assert "glob" not in parse_qs(tab.query()[1:])
    assert tab.tiles.count() >= 60


def test_copies_are_folded_under_the_better_one(tab: Any, served: Any) -> None:
    name = next(name for name in CATEGORIES if served.book.truth("000000.jpg", name))
    tab.open(f"?q=a+{name.replace(' ', '+')}&fold=1&glob=*")
    tab.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    tab.wait("document.querySelectorAll('.hit').length === 120")
    assert tab.page.locator(".folded").all_inner_texts() == ["+1"]


def test_nothing_found_says_why(tab: Any) -> None:
    tab.open("?q=a+keyboard&under=/nowhere")
    assert "Nothing found" in tab.page.inner_text("#state")
    assert "passes the filter: under /nowhere" in tab.page.inner_text("#state")
    tab.page.click("text=Ask without filters")
    tab.settle()
    assert tab.tiles.count() >= 60


@pytest.mark.parametrize("before", ["a dog AND ", "  \N{DOG FACE} \N{BONE} AND "])
def test_caret_stands_under_what_does_not_parse(tab: Any, before: str) -> None:
    tab.open()
    tab.ask(f"{before}OR a cat")
    assert "Expected a name after AND, found OR" in tab.page.inner_text("#question-error")
    assert tab.page.get_attribute("#question", "aria-invalid") == "true"
    mark = tab.page.locator("#caret .mark").bounding_box()
    expected = tab.page.evaluate(
        """before => {
            const input = document.getElementById('question'), style = getComputedStyle(input);
            const canvas = document.createElement('canvas').getContext('2d');
            canvas.font = style.font;
            return input.getBoundingClientRect().left + canvas.measureText(before).width;
        }""",
        before.lstrip(),
    )
    assert (
        tab.page.evaluate("document.getElementById('question').selectionStart")
        == len(before.lstrip().encode("utf-16-le")) // 2
    )
    assert mark["x"] + mark["width"] / 2 == pytest.approx(expected, abs=3)
    tab.page.press("#question", "End")
    tab.page.keyboard.type("!")
    assert tab.page.inner_text("#question-error") == ""
    assert tab.page.locator("#caret").is_hidden()


def test_recent_questions_and_examples(tab: Any) -> None:
    tab.open()
    options = tab.page.locator("#suggestions [role=option]")
    tab.ask("a keyboard")
    tab.page.fill("#question", "")
    assert [text.split("\n")[0] for text in options.all_inner_texts()] == [
        "a keyboard",
        "a bicycle",
        "a dog AND an umbrella",
        "Forget the questions asked before",
    ]
    tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("ArrowDown")
    assert tab.page.get_attribute("#question", "aria-activedescendant") == options.nth(1).get_attribute("id")
    asked, _ = _asked(tab, lambda: tab.page.keyboard.press("Enter"))
    assert asked["text"] == "a bicycle"
    assert options.count() == 0 or not options.first.is_visible()
    tab.open()
    tab.page.click("#question")
    assert options.first.inner_text().startswith("a bicycle")
    assert "asked before" in options.first.inner_text()
    for _ in range(options.count()):
        tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("Enter")
    assert [text.split("\n")[0] for text in options.all_inner_texts()] == [
        "a bicycle",
        "a dog AND an umbrella",
    ]
    assert tab.page.evaluate("localStorage.getItem('for_ray.recent')") == "[]"
    assert tab.query() == ""


def test_address_holds_all_of_it(tab: Any, open_tab: Any) -> None:
    tab.open("?q=a+keyboard+AND+a+ghost&glob=*0.jpg&fold=1&k=30")
    tab.tiles.nth(1).locator(".tile").click()
    tab.page.locator(".slot").first.wait_for()
    tab.page.locator(".slot-list .slot[aria-pressed=false]").first.click()
    here = tab.query()
    other = open_tab()
    other.open(here)
    other.page.locator(".slot").first.wait_for()
    assert other.query() == here
    for read in (
        lambda each: each.ids(),
        lambda each: each.page.input_value("#question"),
        lambda each: each.page.input_value("[name=glob]"),
        lambda each: each.page.is_checked("[name=fold]"),
        lambda each: each.page.inner_text("#viewer-title"),
        lambda each: each.page.locator(".slot-list .slot").all_inner_texts(),
        lambda each: each.page.get_attribute(".slot[aria-pressed=true]", "data-slot"),
    ):
        assert read(other) == read(tab)
    other.page.keyboard.press("Escape")
    other.wait("!location.search.includes('image=')")
    assert parse_qs(other.query()[1:]).keys() == {"q", "glob", "fold", "k"}
