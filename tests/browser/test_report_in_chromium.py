"""The report's page as a user has it, narrow and wide: what is moved and clicked changes what is shown. Needs Chromium.

make browser
"""

import base64
import json
import re
import shutil
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from scipy.stats import binomtest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from anomalib_cse.deployment.post_processing import MidwayPostProcessor
from anomalib_cse.report import Report

KINDS = ("good", "bent", "<glue>", "thread")
COUNT = 200  # more than are shown at first
SCORES = np.random.default_rng(0).integers(0, 101, COUNT) / 100
OF = [KINDS[number % len(KINDS)] for number in range(COUNT)]
SCORES[np.array(OF) == "good"] *= 0.7
SCORES = np.maximum(SCORES, 0.01).astype(np.float32).astype(float)  # as models give them; no defect at the scale's end
NAMES = [f"{number:03}'\".png" for number in range(COUNT)]


def write(folder, *, labelled):
    """The page of the images above, as the callback writes it."""
    own, report = MidwayPostProcessor(), Report()
    for name, value in own.named_buffers():
        value.fill_({"min": 0, "max": 1, "threshold": 0.5}.get(name.rpartition("_")[2], 0))
    trainer = SimpleNamespace(
        default_root_dir=folder,
        fast_dev_run=False,
        ckpt_path=None,
        callbacks=[],
        checkpoint_callback=None,
        callback_metrics={"image_AUROC": 0.9},
        test_dataloaders=[],
    )
    model = SimpleNamespace(post_processor=own, device=torch.device("cpu"))
    report.on_test_start(trainer, model)
    batch = ImageBatch(
        image=torch.rand(COUNT, 3, 32, 32),
        image_path=[f"/x/{kind}/{name}" for kind, name in zip(OF, NAMES, strict=True)],
        gt_label=torch.tensor([kind != "good" for kind in OF]) if labelled else None,
        pred_score=torch.tensor(SCORES, dtype=torch.float32),
        anomaly_map=torch.rand(COUNT, 32, 32),
    )
    report.on_test_batch_end(trainer, model, batch, batch, 0)
    report.on_test_end(trainer, model)
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module", params=[400, 1600])
def chromium(request):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--hide-scrollbars", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    size = {"width": request.param, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)  # a window is 500 wide at least
    driver.width = request.param
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return {labelled: write(tmp_path_factory.mktemp("page"), labelled=labelled) for labelled in (True, False)}


@pytest.fixture
def page(chromium, pages):
    yield from opened(chromium, pages[True])


@pytest.fixture
def without_labels(chromium, pages):
    yield from opened(chromium, pages[False])


def opened(driver, address):
    driver.get_log("performance")  # of the page before
    driver.get(address)
    settle(driver)
    assert driver.execute_script("return document.documentElement.scrollWidth") == driver.width
    yield driver
    assert [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    requests = [entry["message"] for entry in driver.get_log("performance")]
    loaded = [re.search(r'"url":"(\w+):', m)[1] for m in requests if '"Network.requestWillBeSent"' in m]
    assert set(loaded) <= {"file", "data"}


def settle(driver):
    """Wait until all that is shown is of the present threshold."""
    script = "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(arguments[0], 20)))"
    driver.execute_async_script(script)


def find(driver, selector):
    return driver.find_element(By.CSS_SELECTOR, selector)


def oracle(threshold):
    """What the page is to say at a threshold, by a naive loop."""
    false_rejects = escapes = found = 0
    kinds = {kind: [0, 0] for kind in KINDS}
    for score, kind in zip(SCORES, OF, strict=True):
        above = score > threshold
        false_rejects += above and kind == "good"
        if kind != "good":
            found, escapes = found + above, escapes + (not above)
        kinds[kind][0 if above else 1] += 1
    return false_rejects, escapes, found, kinds


def check(driver, threshold):
    """All figures are those of a threshold."""
    settle(driver)
    false_rejects, escapes, found, kinds = oracle(threshold)
    good, defects = OF.count("good"), COUNT - OF.count("good")
    text = {
        name: find(driver, f"#{name}").text for name in ("false-rejects", "escapes", "precision", "recall", "rejected")
    }
    assert text == {
        "false-rejects": f"{false_rejects} of {good}",
        "escapes": f"{escapes} of {defects}",
        "precision": f"{100 * found / (found + false_rejects):.1f} %",
        "recall": f"{100 * found / defects:.1f} %",
        "rejected": f"{found + false_rejects} of {COUNT}",
    }
    assert find(driver, "#false-rejects-share").text == f"{100 * false_rejects / good:.1f} %"
    for name, number, of in (("false-rejects", false_rejects, good), ("recall", found, defects)):
        low, high = binomtest(number, of).proportion_ci(0.95, method="wilson")
        ends = [float(text) for text in re.findall(r"[\d.]+", find(driver, f"#{name}-range").text)]
        assert ends == pytest.approx([100 * low, 100 * high], abs=0.5)
    rows = [row.text.split() for row in driver.find_elements(By.CSS_SELECTOR, "#kinds tr")]
    expected = [[kind, str(sum(kinds[kind])), *map(str, kinds[kind])] for kind in ("good", *sorted(KINDS[1:]))]
    assert [row[:4] for row in rows] == expected
    assert float(find(driver, "#number").get_attribute("value")) == pytest.approx(threshold)
    assert float(find(driver, "#slider").get_attribute("value")) == pytest.approx(threshold, abs=5e-4)  # a step
    assert float(find(driver, "#camera").text.removeprefix("--threshold ")) == pytest.approx(threshold)
    for name, x, y in (
        ("roc", false_rejects / good, found / defects),
        ("precision-recall", found / defects, found / (found + false_rejects)),
    ):
        at = driver.execute_script(f"const t = document.getElementById('{name}').data[1]; return [t.x[0], t.y[0]]")
        assert at == pytest.approx([x, y])
    line = driver.execute_script("const {x0, x1, y0, y1} = $('histogram').layout.shapes[0]; return [x0, x1, y0, y1]")
    assert line == pytest.approx([threshold, threshold, 0, 1])


def names(driver):
    return [card.get_attribute("title") for card in driver.find_elements(By.CSS_SELECTOR, ".card .name")]


def listed(wanted=lambda number: True, *, order="nearest", threshold=0.5):
    """Names of the wanted images in order."""
    ranks = {"nearest": lambda n: (abs(SCORES[n] - threshold), n), "highest": lambda n: (-SCORES[n], n)}
    numbers = sorted(range(COUNT), key=ranks.get(order, ranks["highest"]))
    return [f"{OF[n]}/{NAMES[n]}" for n in (numbers[::-1] if order == "lowest" else numbers) if wanted(n)]


def test_line_is_dragged_and_all_figures_follow(page):
    check(page, 0.5)
    shift = page.width // 10
    for place in (0.5, 0.02):  # held near its end it would lean
        before = float(find(page, "#number").get_attribute("value"))
        line = find(page, "#histogram .shapelayer path")
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", line)
        up = round(line.rect["height"] * (0.5 - place))
        hold = ActionChains(page).move_to_element_with_offset(line, 0, -up).click_and_hold()
        hold.move_by_offset(shift // 2, 0).move_by_offset(shift // 2, 10).perform()
        settle(page)
        held = float(find(page, "#number").get_attribute("value"))
        assert held > before + 0.05
        assert find(page, "#summary").text.startswith(f"{oracle(held)[0]} false reject")  # before it is let go
        ActionChains(page).release().perform()
        settle(page)
        width = find(page, "#histogram .nsewdrag").rect["width"]
        start, end = page.execute_script("return $('histogram').layout.xaxis.range")
        now = float(find(page, "#number").get_attribute("value"))
        assert now == pytest.approx(before + shift / width * (end - start), abs=0.002)
        assert now == pytest.approx(held, abs=0.002)
        check(page, now)
    find(page, "#reset").click()
    check(page, 0.5)


def test_slider_and_number_move_the_line(page):
    slider, number = find(page, "#slider"), find(page, "#number")
    page.execute_script("arguments[0].focus()", slider)
    slider.send_keys(*[Keys.ARROW_RIGHT] * 3)
    check(page, 0.503)
    number.send_keys(Keys.CONTROL, "a", Keys.NULL, "0.31234", Keys.ENTER)
    check(page, 0.31234)
    number.send_keys(Keys.CONTROL, "a", Keys.NULL, "7", Keys.ENTER)  # as far as scores go
    settle(page)
    assert (number.get_attribute("value"), find(page, "#precision").text) == ("1.00", "\u2013")
    assert find(page, "#rejected").text == f"0 of {COUNT}"
    assert find(page, "#said").text == "7 is beyond the scores: the threshold is 1.00, the highest that there is"
    number.send_keys(Keys.CONTROL, "a", Keys.NULL, "0,25", Keys.ENTER)  # a comma is a decimal point
    check(page, 0.25)
    number.send_keys(Keys.ARROW_UP)
    check(page, 0.251)
    number.send_keys(Keys.CONTROL, "a", Keys.NULL, "much", Keys.ENTER)
    assert find(page, "#said").text == "\u201cmuch\u201d is no number: the threshold stays"
    check(page, 0.251)


def test_presets_choose_the_threshold_that_they_name(page):
    def press(name):
        page.execute_script("arguments[0].click()", find(page, f"[data-preset={name}]"))
        settle(page)
        return page.execute_script("return threshold")

    cuts = [*np.unique(SCORES), 0.0]
    good, defects = OF.count("good"), COUNT - OF.count("good")
    outcomes = [oracle(cut)[:3] for cut in cuts]
    at = press("escape")
    assert oracle(at)[:2] == min((wrong, missed) for wrong, missed, _ in outcomes if missed == 0)
    page.execute_script("$('most').value = '2,5'")
    at = press("rejects")
    assert oracle(at)[0] <= 0.025 * good
    assert oracle(at)[1] == min(missed for wrong, missed, _ in outcomes if wrong <= 0.025 * good)
    wrong, missed, found = oracle(press("f1"))[:3]
    assert found / (2 * found + wrong + missed) == max(f / (2 * f + w + m) for w, m, f in outcomes)
    field = find(page, "#prevalence")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
    field.send_keys(Keys.CONTROL, "a", Keys.NULL, "1", Keys.ENTER)
    wrong, missed = oracle(press("cost"))[:2]
    least = min(0.01 * m / defects * 10 + 0.99 * w / good for w, m, _ in outcomes)
    assert 0.01 * missed / defects * 10 + 0.99 * wrong / good == pytest.approx(least)
    page.execute_script("setThreshold(0.5)")
    settle(page)
    wrong, missed, found = oracle(0.5)[:3]
    right = 0.01 * found / defects
    assert find(page, "#precision").text == f"{100 * right / (right + 0.99 * wrong / good):.1f} %"


def test_decision_is_saved_and_mistakes_are_printed(page, tmp_path):
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.execute_script("setThreshold(0.62); $('save').click()")
    assert find(page, "#said").text == "The decision lacks who: say it"
    find(page, "#who").send_keys("Q. Manager")
    find(page, "#why").send_keys('no "escapes" wanted')
    page.execute_script("$('save').click()")
    file = tmp_path / "decision.json"
    WebDriverWait(page, 10).until(lambda _: file.exists() and file.stat().st_size)
    made = json.loads(file.read_text())
    assert (made["threshold"], made["who"], made["why"]) == (0.62, "Q. Manager", 'no "escapes" wanted')
    assert datetime.fromisoformat(made["when"]).tzinfo is not None
    page.execute_script("setThreshold(0.5)")
    settle(page)
    seen = page.execute_script(
        "dispatchEvent(new Event('beforeprint')); return document.querySelectorAll('.card').length"
    )
    assert seen == sum(oracle(0.5)[:2])
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    settle(page)
    pdf = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 4


def test_images_are_filtered_and_follow_the_threshold(page):
    def show(name):
        button = find(page, f"input[value='{name}']")
        page.execute_script("arguments[0].click()", button)
        settle(page)

    def all_names():
        for _ in range(10):
            page.execute_script("window.scrollTo(0, document.body.scrollHeight)")
            settle(page)
        return names(page)

    shown = names(page)
    assert 60 <= len(shown) < COUNT
    assert shown == listed()[: len(shown)]
    assert all_names() == listed()
    for order in ("highest", "lowest", "nearest"):
        Select(find(page, "#order")).select_by_value(order)
        assert all_names() == listed(order=order)
    for threshold in (0.5, 0.6):
        page.execute_script("setThreshold(arguments[0])", threshold)
        settle(page)

        def above(n, threshold=threshold):
            return SCORES[n] > threshold

        wanted = {
            "rejected": above,
            "false reject": lambda n: above(n) and OF[n] == "good",
            "escape": lambda n: not above(n) and OF[n] != "good",
            "mistake": lambda n: above(n) == (OF[n] == "good"),
        }
        for name, rule in wanted.items():
            show(name)
            assert all_names() == listed(rule, threshold=threshold)
            assert find(page, f"input[value='{name}'] + span").text == str(len(listed(rule)))
            verdicts = {verdict.text for verdict in page.find_elements(By.CSS_SELECTOR, ".card .verdict")}
            assert verdicts <= ({"false reject", "escape"} if name == "mistake" else {name, "false reject"})
    show("all")
    Select(find(page, "#kind")).select_by_visible_text("<glue>")
    assert all_names() == listed(lambda n: OF[n] == "<glue>", threshold=0.6)
    show("false reject")
    assert names(page) == []
    assert find(page, "#none").is_displayed()


def test_image_is_looked_at_by_pointer_and_by_keyboard(page):
    cards = page.find_elements(By.CSS_SELECTOR, ".card button")[:3]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", cards[0])

    def seen():
        return [float(find(card, ".map").value_of_css_property("opacity")) > 0.5 for card in cards]

    assert seen() == [False, False, False]
    ActionChains(page).move_to_element(cards[1]).perform()
    assert seen() == [False, True, False]
    for picture in cards[1].find_elements(By.TAG_NAME, "img"):
        WebDriverWait(page, 5).until(lambda _, p=picture: p.get_property("naturalWidth") == 32)
    ActionChains(page).move_to_element(find(page, "#number")).perform()
    page.execute_script("arguments[0].focus()", find(page, "#order"))
    ActionChains(page).send_keys(Keys.TAB).perform()
    assert seen() == [True, False, False]
    ActionChains(page).send_keys(Keys.ENTER).perform()
    expected = listed()

    def viewed():
        settle(page)
        return find(page, "#viewer-name").text

    assert viewed() == expected[0]
    ActionChains(page).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT).perform()
    assert viewed() == expected[1]
    outline = """
        const canvas = $("viewer-outline");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let i = 0; i < data.length; i += 4) count += data[i] === 0 && data[i + 1] === 229 && data[i + 2] === 255;
        return count;"""
    WebDriverWait(page, 5).until(lambda _: page.execute_script(outline) > 100)  # maps are noise about the threshold
    ActionChains(page).send_keys("r").perform()
    rejected = listed(lambda n: SCORES[n] > 0.5)
    assert viewed() == (expected[1] if expected[1] in rejected else rejected[0])
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not find(page, "#viewer").is_displayed()
    assert names(page) == rejected[: len(names(page))]


def test_without_labels_there_is_what_is_rejected(without_labels):
    page = without_labels
    page.execute_script("setThreshold(0.3)")
    settle(page)
    rejected = int((SCORES > 0.3).sum())
    assert find(page, "#rejected").text == f"{rejected} of {COUNT}"
    assert find(page, "#summary").text == f"{rejected} images rejected ({100 * rejected / COUNT:.1f} %)"
    assert not page.find_elements(By.CSS_SELECTOR, "#escapes, #roc, #precision, input[value=mistake]")
    assert {verdict.text for verdict in page.find_elements(By.CSS_SELECTOR, ".card .verdict")} <= {
        "rejected",
        "accepted",
    }
