"""Jobs as HTML: every word of a prompt, a file or a message is shown as text."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

from sfumato.errors import BadInput
from sfumato.files import read_png_metadata
from sfumato.foreign import reading
from sfumato.plan import human_time
from sfumato.text import counted, isolated, visible

from .actions import command, one_picture
from .child import LOOK
from .jobs import Job, Step

SHOWN = 64
"""Pictures of a step that are shown; the others lie in its folder."""
LONGEST = 4000
"""Characters of what a command printed."""
PAGES = ("index.html",)
DRAWING = ("sample", "steer")
"""Commands whose pictures stand one by one, each with its record, whether or not there is a page too."""


def text(value: object) -> str:
    """``value`` as text between tags: nothing in it is markup, no control character acts, no direction spreads."""
    return escape(isolated(str(value)))


def refused(error: Exception | str) -> str:
    """Why nothing was done."""
    return f'<p class="refused" role="alert">{text(error)}</p>'


def copied(line: str) -> str:
    """A command line with a button that copies it."""
    return (
        f'<div class="command"><pre dir="ltr">{escape(visible(line))}</pre>'
        f'<button type="button" class="copy" data-copy="{escape(visible(line))}">copy</button></div>'
    )


def running(job: Job, ahead: int = 0) -> tuple[str, str]:
    """How far a job is, and what it has made so far."""
    if job.state == "waiting":
        others = f"{counted(ahead, 'other job')} {'is' if ahead == 1 else 'are'}"
        return f'<p class="state" data-state="waiting">waits until {others} over</p>', ""
    step, moved = job.steps[job.at], job.moved()
    title = f"{step.title} ({job.at + 1} of {len(job.steps)})" if len(job.steps) > 1 else step.title
    told = "starts" if moved is None else f"{moved[0]}: {moved[1]} of {moved[2]}"
    share = 0 if moved is None or not moved[2] else 100 * moved[1] / moved[2]
    seconds = human_time(time.monotonic() - job.began)
    bar = f'<div class="bar" role="progressbar" aria-valuenow="{share:.0f}"><i style="width:{share:.1f}%"></i></div>'
    head = f'<p class="state" data-state="running">{text(title)} · {text(told)} · {seconds}</p>{bar}'
    return head, "".join(_step(job, i) for i in range(job.at))


def finished(job: Job) -> tuple[str, str]:
    """How a job ended; and what it made, with records and commands."""
    warned = "".join(f'<p class="note">{text(line)}</p>' for line in job.warnings())
    shown = "".join(_step(job, i) for i in range(len(job.steps) if job.state == "done" else job.at))
    if job.state != "done":
        return f'<p class="{job.state}" role="alert" data-state="{job.state}">{text(job.sentence())}</p>{warned}', shown
    if job.steps[0].args[0] == LOOK:
        return _model(job), ""
    head = f'<p class="state" data-state="done">done in {human_time(job.seconds)} · {text(job.folder)}</p>'
    commands = "".join(copied(command(step, job.number)) for step in job.steps)
    return head + warned, f'{shown}<section class="again"><h3>The same again</h3>{commands}</section>'


def page(url: str) -> str:
    """A report's page in a frame of its own, which can touch nothing around it."""
    return (
        f'<p class="note"><a href="{escape(url)}" target="_blank" rel="noopener">open it by itself</a></p>'
        f'<iframe class="page" sandbox="allow-scripts" src="{escape(url)}" title="report"></iframe>'
    )


def address(job: Job, file: Path) -> str:
    """Where the browser finds a file of a job."""
    return f"/runs/{quote(job.folder.name)}/{quote(file.relative_to(job.folder).as_posix())}"


def _step(job: Job, i: int) -> str:
    step = job.steps[i]
    if step.out is None or not step.out.is_dir():
        return ""
    for name in PAGES if step.args[0] not in DRAWING else ():
        if (file := step.out / name).is_file():
            return page(address(job, file)) + _printed(job, i)
    files = [f for f in sorted(step.out.glob("*.png")) if f.name != "sheet.png"]
    if not files:
        return _printed(job, i)
    figures = "".join(_figure(job, step, file) for file in files[:SHOWN])
    more = f"<p class='note'>{len(files) - SHOWN} more in {text(step.out)}</p>" if len(files) > SHOWN else ""
    head = f'<h3 class="strip">{text(step.title)}</h3>'
    return f'{head}<div class="pictures" data-step="{escape(step.title)}">{figures}</div>{more}' + (
        _printed(job, i) if step.args[0] in ("attack", "steer") else ""
    )


def _figure(job: Job, step: Step, file: Path) -> str:
    try:
        with reading(file, "a picture"):
            record = read_png_metadata(file)
    except BadInput as error:
        return refused(error)
    prompt, seed = record.get("prompt", ""), record.get("seed", "")
    line = one_picture(step, job.number, prompt, seed) or command(step, job.number)
    url = escape(address(job, file))
    caption = f"{text(prompt) or text(file.stem)}{f' <span>seed {text(seed)}</span>' if seed else ''}"
    return (
        f'<figure><a href="{url}" download><img src="{url}" alt="{escape(visible(prompt))}" loading="lazy"></a>'
        f"<figcaption>{caption}</figcaption><details><summary>record</summary>{_table(record)}{copied(line)}</details></figure>"
    )


def _table(record: Mapping[str, object]) -> str:
    rows = "".join(f"<tr><th>{text(k)}</th><td>{text(v)}</td></tr>" for k, v in record.items() if v not in ("", "null"))
    return f'<div class="scroll"><table>{rows}</table></div>'


def _printed(job: Job, i: int) -> str:
    """What a command printed."""
    said = job.said(step=i).strip()[-LONGEST:]
    shown = "\n".join(escape(visible(line)) for line in said.splitlines())
    return f"<details class='said'><summary>what it says</summary><pre>{shown}</pre></details>" if shown else ""


def _model(job: Job) -> str:
    told = json.loads(job.said())
    words = told["words"]
    facts = {
        "family": told["family"], "pictures": f"{told['size']} pixels", "parameters": f"{told['parameters']:,}",
        "steps": told["sampling_steps"], "SHA-256": told["sha256"] or "",
    }  # fmt: skip
    rows = "".join(f"<div><dt>{k}</dt><dd>{text(v)}</dd></div>" for k, v in facts.items() if v not in ("", None))
    known = "".join(f"<p class='words'><b>{text(k)}</b> {text(', '.join(v))}</p>" for k, v in words.items())
    head = f"<details class='known'><summary>the words it knows</summary>{known}</details>" if known else ""
    named = text(job.steps[0].args[1])
    return f'<p class="state" data-state="done">{named} is loaded</p><dl class="facts">{rows}</dl>{head}'
