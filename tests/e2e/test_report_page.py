"""The report in a real headless Chromium, opened from the disk: drawn, searchable, silent, and safe to read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from chromium import Page, browser, find_chromium
from jobfolder import message, write_job, write_lines

from gym_bus.errors import FailureKind
from gym_bus.results.report.page import write_report

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed: apt-get install chromium"),
]

HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"><svg onload=alert(1)>"
    "<a href='javascript:alert(2)'>{{ 7*7 }}</a> <!-- ]]> &lt;b&gt; \u2028 ``` </textarea></style>"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Page]:
    async with browser(tmp_path_factory.mktemp("chromium")) as page:
        await page.size(1000, 900)
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two jobs on the same four tasks, with one failure and a tool's long text."""
    folder = tmp_path_factory.mktemp("jobs")
    rewards = [[1.0, 0.0], [1.0, 1.0], [0.0, FailureKind.MODEL_TIMEOUT], [0.0, 0.0]]
    write_job(folder / "first", rewards)
    write_job(
        folder / "second", [[1.0, 1.0], *rewards[1:]], model="other", said=lambda *_: "a rare zebra\n```py\nx\n```"
    )
    write_report([folder / "first", folder / "second"], folder / "report.html", by="level")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose every text tries to become markup, as NeMo Gym would have written it."""
    folder = tmp_path_factory.mktemp("hostile")
    told = [{"role": "user", "content": HOSTILE}]
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": HOSTILE}]},
        {"type": "function_call", "name": HOSTILE, "arguments": HOSTILE},
        {"type": "function_call_output", "output": HOSTILE},
        message(f"{HOSTILE}\n```{HOSTILE.replace('`', '')}\n{HOSTILE}\n```"),
    ]
    row = {"question": HOSTILE, "expected_answer": HOSTILE, "responses_create_params": {"input": told}}

    def line(task: int, **more: Any) -> dict[str, Any]:
        key = {"agent_ref": {"name": HOSTILE}, "_ng_task_index": task, "_ng_rollout_index": 0}
        return {**row, **key, **more}

    response = {"model": HOSTILE, "output": output, "incomplete_details": {"reason": HOSTILE}}
    failure = {"_ng_failure_class": HOSTILE, "_ng_failure_detail": HOSTILE, "_ng_failure_stage": HOSTILE}
    write_lines(folder / "rollouts.jsonl", line(0, reward=0.5, response=response, **{HOSTILE: HOSTILE}))
    write_lines(folder / "rollouts_failures.jsonl", line(1, **failure))
    write_lines(folder / "rollouts_materialized_inputs.jsonl", line(0), line(1))
    write_report([folder], folder / "report.html")
    return (folder / "report.html").as_uri()


RESET = """for (const id of ["query", "by-job", "by-outcome", "by-reason"]) document.getElementById(id).value = "";
document.getElementById("one-task").click()"""


async def show(page: Page, url: str) -> None:
    """The report with no filter set; loaded only where another page is in the tab."""
    if await page.eval("location.href.split('#')[0]") == url:
        await page.eval(RESET)
    else:
        await page.open(url)


async def type_in(page: Page, query: str) -> None:
    await page.eval(f"query.value = {query!r}; query.dispatchEvent(new Event('input'))")


async def test_every_plot_is_drawn_and_nothing_is_asked_of_the_network(page: Page, report: str) -> None:
    await page.open(report)

    names = await page.eval("[...document.querySelectorAll('.plot')].map((one) => one.dataset.figure)")
    drawn = await page.eval(
        "[...document.querySelectorAll('.plot')]"
        ".filter((one) => one.querySelector('.trace .point, .trace .js-line, .heatmaplayer image'))"
        ".map((one) => one.dataset.figure)"
    )

    wanted = {"pass-curve", "subsets", "rewards", "task-rates", "lengths", "waterfall", "progress", "heat-0", "heat-1"}
    assert set(names) == wanted
    assert drawn == names
    assert page.requests == [report]
    assert page.complaints == []


async def test_a_search_leaves_what_holds_the_words_and_marks_them(page: Page, report: str) -> None:
    await show(page, report)
    await type_in(page, "ZEBRA")
    await page.until("count.textContent.startsWith('7 of')")

    jobs = await page.eval("[...document.querySelectorAll('#list [data-at]')].map((one) => one.textContent)")

    assert len(jobs) == 7
    assert all("a rare zebra" in text for text in jobs)
    assert await page.eval("document.querySelector('#detail mark').textContent") == "zebra"
    assert await page.eval("document.querySelector('#detail pre code').textContent") == "x"
    await type_in(page, "no such words")
    await page.until("count.textContent.startsWith('0 of')")
    assert await page.eval("detail.textContent") == "No rollout fits."


async def test_filters_by_job_and_outcome_show_the_failure_with_advice(page: Page, report: str) -> None:
    await show(page, report)
    shown = "document.querySelectorAll('#list [data-at]').length"
    assert await page.eval(shown) == 16

    await page.eval("document.querySelector('[data-show][data-job=\"1\"]').click()")

    assert await page.eval(shown) == 1
    text = await page.eval("detail.innerText")
    assert "second" in text and "Task 2, rollout 1" in text
    assert "task 2 broke" in text and "call_limit_s" in text


async def test_a_dot_in_the_table_of_tasks_opens_its_rollout(page: Page, report: str) -> None:
    await show(page, report)

    await page.eval("document.querySelector('#task-table tbody tr .dot.fail').click()")

    assert (await page.eval("location.hash")) == "#rollout=0/0/1"
    text = await page.eval("detail.innerText")
    assert "task 0 makes 1" in text and "expected_answer" in text and "please: what is 0?" in text


async def test_a_task_shows_its_rollouts_in_all_jobs(page: Page, report: str) -> None:
    await show(page, report)
    await page.eval(
        "[...document.querySelectorAll('#task-table .link')].find((one) => one.textContent === '0').click()"
    )
    assert await page.eval("document.querySelectorAll('#list [data-at]').length") == 4
    await page.eval("document.getElementById('one-task').click()")
    assert await page.eval("document.querySelectorAll('#list [data-at]').length") == 16


async def test_an_address_leads_to_its_rollout(page: Page, report: str) -> None:
    await page.open(f"{report}#rollout=1/3/1")
    assert "Task 3, rollout 1" in await page.eval("detail.innerText")


async def test_the_page_fits_a_phone_and_plots_follow_the_theme(page: Page, report: str) -> None:
    await page.size(390, 800)
    await page.open(report)
    assert await page.eval("document.documentElement.scrollWidth") == 390
    colour = "getComputedStyle(document.querySelector('.xtick text')).fill"
    light = await page.eval(colour)
    await page.eval("for (let i = 0; i < 2; i++) document.getElementById('theme').click()")
    await page.until(f"{colour} !== {light!r}")
    await page.size(1000, 900)


async def test_hostile_texts_are_shown_as_texts(page: Page, hostile_report: str) -> None:
    await page.open(hostile_report)

    markup = await page.eval(
        "document.querySelectorAll('img, main svg[onload], a[href^=\"javascript\"], iframe').length"
    )
    scripts = await page.eval("document.scripts.length")
    shown = await page.eval("detail.textContent")

    assert markup == 0
    assert scripts == 2  # the page's own and the plotting library
    assert shown.count(HOSTILE) >= 7
    assert HOSTILE in await page.eval("document.title") and "owned" not in (await page.eval("document.title")).split()
    assert HOSTILE.split("\u2028")[0] in await page.eval("failures.textContent")
    assert page.requests == [hostile_report]
    assert page.complaints == []


async def test_nothing_stands_where_a_task_has_no_other_rollout(page: Page, hostile_report: str) -> None:
    await show(page, hostile_report)

    stray = "[...detail.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE).map((node) => node.textContent)"

    assert await page.eval("detail.childElementCount") > 3
    assert await page.eval(stray) == []


async def test_markup_that_got_in_could_not_run_either(page: Page, report: str) -> None:
    await show(page, report)

    refused = await page.eval("""new Promise((done) => {
        const refused = [];
        document.addEventListener("securitypolicyviolation", (event) => {
          if (refused.push(event.effectiveDirective) === 2) done(refused);
        });
        detail.innerHTML = "<img src=x onerror='document.title = 1'>";
    })""")

    assert sorted(refused) == ["img-src", "script-src-attr"]
    assert "2 jobs" in await page.eval("document.title")
