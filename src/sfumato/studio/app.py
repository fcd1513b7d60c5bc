"""The page: a tab for each verb. What it does is in `actions`; here is where things stand and what a click starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from sfumato import catalog
from sfumato.commands.attack import Attack
from sfumato.commands.sample import Sample
from sfumato.errors import BadInput
from sfumato.settings import EMBEDDED, settings_for
from sfumato.text import visible

from . import actions, doors, ledgers, views
from .forms import Field, fields_of, words

if TYPE_CHECKING:
    from .jobs import Job
    from .room import Studio

BETWEEN = 0.4
"""Seconds between two looks at a job."""
DRAWING = ("seeds", "sampling_steps", "cfg_scale", "negative_prompt", "scheduler", "size")
WHERE = ("device", "dtype", "prediction", "offload")
WATCHED = ("seeds", "sampling_steps")
FIRST = {
    "erase": ("concepts", "anchors"),
    "attack": ("concept", "n", "original"),
    "audit": ("concepts", "n", "n_retain", "n_attack", "attacks", "sampling_steps"),
}
"""Fields that stand above the fold."""
SERIF = ("Iowan Old Style", "Palatino Linotype", "Palatino", "P052", "Liberation Serif", "Georgia", "serif")
SANS = ("-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Liberation Sans", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace")
Form = tuple[list[Field], list[Any]]


def theme() -> gr.themes.Base:
    """The machine's own fonts, and the colours of the reports (`style.css` maps them)."""
    return gr.themes.Base(font=SANS, font_mono=MONO, radius_size="none", spacing_size="md")


def blocks(studio: Studio) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="sfumato studio", analytics_enabled=False, fill_width=True) as page:
        gr.HTML('<header class="brand"><b>sfumato</b> studio<span>on this machine only</span></header>')
        tabs = Tabs(studio)
        tabs.bar()
        with gr.Tabs(elem_id="tabs"):
            for build in (tabs.draw, tabs.steer, tabs.erase, tabs.attack, tabs.audit, tabs.reports, tabs.ledger):
                with gr.Tab(build.__name__, elem_id=f"tab-{build.__name__}"):
                    build()
        tabs.connect(page)
    return page


def component(field: Field, prefix: str) -> Any:
    """One entry of a form."""
    told: dict[str, Any] = {
        "label": f"{field.label}{' (needed)' if field.required else ''}",
        "info": escape(field.help, quote=False) or None, "elem_id": f"{prefix}-{field.name}",
        "interactive": True,  # fields that only a form made later reads are taken for outputs otherwise
    }  # fmt: skip
    if field.kind == "tick":
        return gr.Checkbox(field.value, **told)
    if field.kind == "choice":
        return gr.Dropdown([(choice or "(nothing)", choice) for choice in field.choices], value=field.value, **told)
    if field.kind == "choices":
        return gr.CheckboxGroup(list(field.choices), value=field.value, **told)
    return gr.Textbox(field.value, lines=2 if field.kind == "lines" else 1, max_lines=6, **told)


def form(
    fields: Sequence[Field], prefix: str, first: Sequence[str] = (), middle: Callable[[], Any] = lambda: None
) -> Form:
    """Components for fields, those of ``first`` above the others, which are folded; ``middle`` is called between."""
    above = [f for f in fields if f.name in first or f.required]
    below = [f for f in fields if f not in above]
    made = [component(field, prefix) for field in above]
    middle()
    if below:
        with gr.Accordion("settings", open=not above, elem_id=f"{prefix}-settings"):
            made += [component(field, prefix) for field in below]
    return [*above, *below], made


class Tabs:
    """What stands on the page, and what is shared between the tabs."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.whole = False
        """Whether the page is laid out."""
        self.choosers: list[tuple[Any, str]] = []
        """Dropdowns of models and of reports, which follow what is made."""
        self.making: list[Any] = []
        """Events after which they do, until all of them are there."""

    # What all share

    def work(self, kind: str, build: Callable[[], actions.Steps]) -> Iterator[tuple[Any, Any]]:
        """Do what ``build`` says, and show how far it is until it is over."""
        try:
            job = self.studio.jobs.submit(kind, build())
        except BadInput as error:
            yield views.refused(error), ""
            return
        yield from self.follow(job)

    def follow(self, job: Job) -> Iterator[tuple[Any, Any]]:
        """How far a job is, whenever that has changed."""
        before = ("", None)
        while not job.over:
            head, body = views.running(job, self.studio.jobs.ahead(job))
            if (head, body) != before:
                yield head, gr.skip() if body == before[1] else body
            before = head, body
            time.sleep(BETWEEN)
        yield views.finished(job)

    def models(self) -> list[tuple[str, str]]:
        """(what it is called, where it lies) of the models at hand."""
        root = self.studio.root
        return [(m, m) for m in EMBEDDED] + [(visible(str(p.relative_to(root))), str(p)) for p in ledgers.models(root)]

    def written(self) -> list[tuple[str, str]]:
        """(what it is called, where it lies) of the reports at hand."""
        root = self.studio.root
        return [(visible(str(p.relative_to(root))), str(p)) for p in ledgers.reports(root)]

    def chooser(self, kind: str, label: str, elem_id: str, value: str | None = None) -> Any:
        choices = self.models() if kind == "model" else self.written()
        made = gr.Dropdown(
            choices, value=value, label=label, elem_id=elem_id, allow_custom_value=True, interactive=True,
            filterable=True,
        )  # fmt: skip
        self.choosers.append((made, kind))
        return made

    def refreshed(self) -> list[Any]:
        """The dropdowns with what there is now."""
        return [gr.update(choices=self.models() if kind == "model" else self.written()) for _, kind in self.choosers]

    def ending(self, kind: str) -> tuple[Any, Any]:
        """Where a tab shows its job, with the way to cancel it."""
        with gr.Row(elem_classes="ending"):
            state = gr.HTML(elem_id=f"{kind}-state", elem_classes="said")
            stop = gr.Button("Cancel", elem_id=f"{kind}-cancel", size="sm", min_width=90, scale=0)
        result = gr.HTML(elem_id=f"{kind}-result", elem_classes="result")
        stop.click(lambda: self.studio.jobs.cancel(kind) and None, queue=False, show_progress="hidden")
        return state, result

    def go(self, button: Any, kind: str, start: Callable[..., Iterator[Any]], inputs: list[Any], ending: tuple) -> None:
        """Start on a click; at the end the dropdowns know what was made."""
        event = button.click(
            start, inputs, list(ending), concurrency_limit=None, show_progress="hidden", trigger_mode="multiple",
        )  # fmt: skip
        self.follow_up(event)

    def follow_up(self, event: Any) -> None:
        """Let the dropdowns know what there is after an event; those of forms come when all dropdowns are there."""
        if self.whole:
            event.then(self.refreshed, None, [c for c, _ in self.choosers], show_progress="hidden")
        else:
            self.making.append(event)

    def connect(self, page: gr.Blocks) -> None:
        """What a page that is opened again has to know."""
        self.whole = True
        page.load(self.refreshed, None, [c for c, _ in self.choosers], show_progress="hidden")
        for event in self.making:
            self.follow_up(event)

    # The model, above all tabs

    def bar(self) -> None:
        with gr.Row(elem_classes="bar-of-models"):
            asked = "model: an embedded one, a folder, or a .safetensors file"
            self.model = self.chooser("model", asked, "model", EMBEDDED[0])
            load = gr.Button("Load", elem_id="load", variant="primary", scale=0, min_width=110)
            send = gr.UploadButton(
                "Send a file", elem_id="send", file_count="single", type="filepath", scale=0, min_width=130
            )
        state, result = gr.HTML(elem_id="load-state", elem_classes="said"), gr.HTML(visible=False)

        def start(model: str) -> Iterator[Any]:
            yield from self.work("load", lambda: actions.look(doors.model_named(model)))

        load.click(start, self.model, [state, result], concurrency_limit=None, show_progress="hidden")
        sent = send.upload(self.take_in, send, [state, self.model], show_progress="hidden")
        self.follow_up(sent)

    def take_in(self, sent: str) -> tuple[Any, Any]:
        """Look at a file that was sent, and keep it if it is what it should be."""
        try:
            kept = doors.taken_in(sent, Path(sent).name, self.studio.root / "uploads", self.studio.largest)
        except BadInput as error:
            return views.refused(error), gr.skip()
        return f'<p class="state">{views.text(kept.name)} is here: load it</p>', gr.update(value=str(kept))

    # The tabs

    def drawing(self, kind: str, only: Sequence[str], prompts: str, label: str = "prompts") -> tuple[Any, Form]:
        told = gr.Textbox(
            prompts, label=f"{label}, one a line", lines=3, max_lines=12, elem_id=f"{kind}-prompts", interactive=True
        )
        fields = fields_of(Sample, only=(*only, "adapters", *WHERE) if kind == "draw" else only)
        return told, form(fields, f"{kind}-draw", ("seeds", "sampling_steps"))

    def draw(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, elem_classes="side"):
                prompts, (fields, parts) = self.drawing("draw", DRAWING, "a red star\na blue fish")
                button = gr.Button("Draw", variant="primary", elem_id="draw-go")
            with gr.Column(scale=3):
                ending = self.ending("draw")

        def start(model: str, prompts: str, *values: Any) -> Iterator[Any]:
            drawing = lambda: actions.Drawing(prompts, tuple(words(fields, values)))
            yield from self.work("draw", lambda: actions.draw(doors.model_named(model), drawing()))

        self.go(button, "draw", start, [self.model, prompts, *parts], ending)

    def method(self, verb: str) -> Any:
        """The choice of a method of the catalogue."""
        names = [m.name for m in catalog.methods(verb)]
        return gr.Dropdown(names, value=names[0], label="method", elem_id=f"{verb}-method", interactive=True)

    def own(self, verb: str, name: str, model: str, middle: Callable[[], Any] = lambda: None) -> Form:
        """What there is to say of a method, and its fields as they suit the model."""
        from sfumato.commands.verb import origin

        entry = catalog.get(name, verb)
        cls = entry.load()
        notes = (entry.paper, f"For: {entry.when} Cost: {entry.cost}. Beware: {entry.beware}")
        told = "".join(f'<p class="note">{views.text(note)}</p>' for note in notes)
        gr.HTML(f'<div class="method"><p>{views.text(entry.summary)}</p>{told}</div>')
        try:
            known = origin(doors.model_named(model))
        except BadInput:
            known = None
        return form(fields_of(cls, settings_for(cls, known)), f"{verb}-{name}", FIRST.get(verb, ()), middle)

    def steer(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, elem_classes="side"):
                method = self.method("steer")
                prompts, (shared, drawn) = self.drawing("steer", DRAWING, "a red star")
                told = "beside the same seeds without it"
                beside = gr.Checkbox(True, label=told, elem_id="steer-beside", interactive=True)

                @gr.render([method, self.model], show_progress="hidden")
                def show(name: str, model: str) -> None:
                    fields, parts = self.own("steer", name, model)
                    button = gr.Button("Draw", variant="primary", elem_id="steer-go")

                    def start(model: str, prompts: str, beside: bool, *values: Any) -> Iterator[Any]:
                        def build() -> actions.Steps:
                            drawing = actions.Drawing(prompts, tuple(words(shared, values[: len(shared)])))
                            own = words(fields, values[len(shared) :])
                            return actions.steer(name, own, doors.model_named(model), drawing, beside)

                        yield from self.work("steer", build)

                    self.go(button, "steer", start, [self.model, prompts, beside, *drawn, *parts], ending)

            with gr.Column(scale=3):
                ending = self.ending("steer")

    def erase(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, elem_classes="side"):
                method = self.method("erase")
                prompts, (shared, drawn) = self.drawing("erase", WATCHED, "a red star\na blue fish", "prompts to watch")

                @gr.render([method, self.model], show_progress="hidden")
                def show(name: str, model: str) -> None:
                    made: list[Any] = []
                    middle = lambda: made.append(gr.Button("Erase and watch", variant="primary", elem_id="erase-go"))
                    fields, parts = self.own("erase", name, model, middle)

                    def start(model: str, prompts: str, *values: Any) -> Iterator[Any]:
                        def build() -> actions.Steps:
                            drawing = actions.Drawing(prompts, tuple(words(shared, values[: len(shared)])))
                            own = words(fields, values[len(shared) :])
                            return actions.erase(name, own, doors.model_named(model), drawing)

                        yield from self.work("erase", build)

                    self.go(made[0], "erase", start, [self.model, prompts, *drawn, *parts], ending)

            with gr.Column(scale=3):
                ending = self.ending("erase")

    def attack(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, elem_classes="side"):
                erased = self.chooser("model", "the erased model", "attack-model")
                method = self.method("attack")
                shared = fields_of(Attack, leave=("model", "adapters", *WHERE))
                shared, given = form(shared, "attack-given", FIRST["attack"])

                @gr.render([method, erased], show_progress="hidden")
                def show(name: str, model: str) -> None:
                    fields, parts = self.own("attack", name, model)
                    button = gr.Button("Attack", variant="primary", elem_id="attack-go")

                    def start(model: str, *values: Any) -> Iterator[Any]:
                        def build() -> actions.Steps:
                            own = words([*shared, *fields], values)
                            return actions.attack(name, own, doors.model_named(model))

                        yield from self.work("attack", build)

                    self.go(button, "attack", start, [erased, *given, *parts], ending)

            with gr.Column(scale=3):
                ending = self.ending("attack")

    def audit(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, elem_classes="side"):
                after = self.chooser("model", "the edited model (the original is the model above)", "audit-after")
                place = gr.Column()
            with gr.Column(scale=3):
                ending = self.ending("audit")
        with place:

            @gr.render([], show_progress="hidden")
            def show() -> None:
                from sfumato.audit import Audit  # it needs the libraries that are still being imported at the start

                made: list[Any] = []
                middle = lambda: made.append(gr.Button("Audit", variant="primary", elem_id="audit-go"))
                wanted = fields_of(Audit, leave=("before", "after"))
                fields, parts = form(wanted, "audit", FIRST["audit"], middle)

                def start(before: str, after: str, *values: Any) -> Iterator[Any]:
                    named = doors.model_named
                    build = lambda: actions.audit(named(before), named(after), words(fields, values))
                    yield from self.work("audit", build)

                self.go(made[0], "audit", start, [self.model, after, *parts], ending)

    def reports(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, elem_classes="side"):
                first = self.chooser("report", "a report: one made here, or the folder of another", "report-first")
                button = gr.Button("Open", variant="primary", elem_id="report-open")
            with gr.Column(scale=2, elem_classes="side"):
                second = self.chooser("report", "beside another", "report-second")
                beside = gr.Button("Compare", elem_id="compare-go")
        ending = self.ending("compare")

        def opened(folder: str) -> tuple[str, str]:
            try:
                found = ledgers.report_in(folder)
            except BadInput as error:
                return views.refused(error), ""
            name = next((n for n, p in self.studio.pages.items() if p == found), f"{len(self.studio.pages) + 1}")
            self.studio.pages[name] = found
            return f'<p class="state">{views.text(found)}</p>', views.page(f"/reports/{name}/index.html")

        def start(one: str, other: str) -> Iterator[Any]:
            build = lambda: actions.compare(*(str(ledgers.report_in(folder)) for folder in (one, other)))
            yield from self.work("compare", build)

        button.click(opened, first, list(ending), show_progress="hidden")
        self.go(beside, "compare", start, [first, second], ending)

    def ledger(self) -> None:
        gr.HTML(lambda: ledgers.ledger(self.studio.ledger), elem_id="ledger", elem_classes="result")
