#!/usr/bin/env python3
"""The page in a real browser: `page.py PROGRAMS [PICTURES [FOLDER]]`.

A coordinator and a worker go through three jobs: one that ends well, one whose checkpoint holds a NaN, and one that goes on. Headless
Chromium shows each, at desk and phone width, in light and dark; what it shows is compared with the report, cell by cell by keyboard,
and nothing may be loaded from elsewhere. The finished run is then read again from its frozen file. With PICTURES, what was seen is
left there; the models are then in FOLDER, which goes again, for paths are seen too. Needs Chromium (Debian: chromium; or CHROMIUM=PATH) and the playwright package.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request

from playwright.sync_api import sync_playwright

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/golden/tiny"
TEXT = ROOT / "tests/golden/text/wikitext2-valid-head.txt"
DESK, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
FAILED = 65
WORDS = {"done": "done", "failed": "ended badly", "running": "running"}
PATIENCE_SECONDS = 120


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(what, ask):
    """What `ask` gives once that is something."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if found := ask():
                return found
        time.sleep(0.1)
    sys.exit(f"page: no {what} within {PATIENCE_SECONDS} s")


def with_a_nan(model, folder):
    """A copy of a checkpoint, one weight of whose second layer is not a number."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in sorted(header) if ".layers.1." in name and name.endswith("proj.weight"))
    at = 8 + length + header[name]["data_offsets"][0]
    nan = {"F32": b"\x00\x00\xc0\x7f", "F16": b"\x00\x7e", "BF16": b"\xc0\x7f"}[header[name]["dtype"]]
    data[at : at + len(nan)] = nan
    path.write_bytes(data)
    return folder


def job(folder, name, model, method, samples):
    """A job file."""
    path = folder / f"{name}.toml"
    path.write_text(
        f'[model]\nsource = "{model}"\n'
        f'[calibration]\nsource = "{TEXT}"\nsamples = {samples}\nsequence_length = 128\n'
        f'[method]\n{method}\n[pattern]\nsparsity = 0.5\n[output]\nuri = "{folder / name}"\n'
    )
    return path


@contextlib.contextmanager
def work_folder():
    """A folder that goes again: the one that was named, or a new one."""
    named = sys.argv[3] if len(sys.argv) > 3 else None
    with tempfile.TemporaryDirectory() as own:
        folder = pathlib.Path(named or own)
        if named:
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            if named:
                shutil.rmtree(folder)


@contextlib.contextmanager
def cluster(programs, folder):
    """A coordinator and a worker: where its page is, and what submits a job to it."""
    listen, page = free_port(), free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ESPALIER__")}
    processes = []

    def start(command, **variables):
        log = open(folder / f"process-{len(processes)}.log", "wb")
        processes.append(subprocess.Popen(command, env=clean | variables, stdout=log, stderr=log))

    try:
        start(
            [programs / "espalier", "coordinator", "--listen", f"127.0.0.1:{listen}", "--runs", folder / "runs"],
            ESPALIER__HTTP__LISTEN=f"127.0.0.1:{page}",
        )
        start(
            [programs / "espalier-worker", "--coordinator", f"http://127.0.0.1:{listen}", "--listen", "127.0.0.1:0"],
            ESPALIER__WORKER__NAME="node-1",
        )
        wait_for("coordinator", lambda: urllib.request.urlopen(f"http://127.0.0.1:{page}/healthz").status == 200)
        submit = [programs / "espalier", "prune", "--coordinator", f"http://127.0.0.1:{listen}", "--job"]
        yield f"http://127.0.0.1:{page}", lambda path: start([*submit, path])
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(30)


def number(text):
    """The first number of a text."""
    return float(re.search(r"-?[\d,]*\.?\d+(?:e[+-]?\d+)?", text)[0].replace(",", ""))


def near(shown, told, digits):
    """Whether a number is shown as it was told, to so many digits behind the point."""
    return abs(shown - told) <= 0.51 * 10**-digits or abs(shown - told) <= 0.006 * abs(told)


class Look:
    """One browser window, what is wrong with what it shows, and what it asked for."""

    def __init__(self, browser, url, scheme, size, pictures):
        self.pictures, self.wrong, self.foreign = pictures, [], []
        self.context = browser.new_context(color_scheme=scheme, viewport=size)
        self.page = self.context.new_page()
        origin = url.split("/#")[0]
        self.page.on("request", lambda asked: asked.url.startswith(origin) or self.foreign.append(asked.url))
        self.page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        self.page.on("console", lambda said: said.type == "error" and self.wrong.append(f"console: {said.text}"))
        self.page.goto(url)
        self.page.wait_for_selector("h1")

    def check(self, right, what):
        if not right:
            self.wrong.append(what)

    def text(self, selector):
        return self.page.locator(selector).first.inner_text()

    def figure(self, name):
        return self.page.locator(f"dl.figures > *:has(dt:text-is('{name}')) dd").inner_text()

    def has_no_sideways_scrolling(self):
        wide, seen = self.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        self.check(wide <= seen, f"the page is {wide} wide and {seen} of it are seen")

    def has_the_colours_of(self, scheme):
        dark = self.page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((all, one) => all + Number(one), 0) < 384"
        )
        self.check(dark == (scheme == "dark"), f"its colours are not {scheme}")

    def end(self, name):
        if self.pictures:
            self.page.screenshot(path=self.pictures / f"{name}.png")
        self.wrong += [f"it asked for {url}" for url in self.foreign]
        self.context.close()
        return [f"{name}: {wrong}" for wrong in self.wrong]


def figures_are_those_of(look, report):
    """The figures on top, and every cell of the map, reached by keyboard."""
    errors = [one["rel_error"] for one in report["sublayers"]]
    mean = sum(errors) / len(errors)
    look.check(near(number(look.figure("mean error")), mean, 5), f"the mean error is {mean}")
    look.check(near(number(look.figure("zeros")), 100 * report["totals"]["sparsity"], 2), "zeros are others than in the report")
    by_layer = {}
    for one in report["sublayers"]:
        by_layer.setdefault(one["layer"], []).append(one)
    chart = look.page.locator("svg[aria-roledescription=chart]").first
    chart.focus()
    look.page.keyboard.press("Home")
    seen = 0
    for layer, row in [(layer, row) for layer in sorted(by_layer) for row in range(len(by_layer[layer]))]:
        look.page.keyboard.press("Home")
        for key in ["ArrowRight"] * layer + ["ArrowDown"] * row:
            look.page.keyboard.press(key)
        told = look.text("p.readout")
        kind = re.match(r"layer (\d+) · (\S+)", told)
        one = next((one for one in by_layer[layer] if kind and f".{kind[2]}." in one["name"]), None)
        if one is None or int(kind[1]) != layer:
            look.check(False, f"cell {layer}/{row} says {told!r}")
            continue
        seen += 1
        shown = number(told.split("error", 1)[1])
        look.check(near(shown, one["rel_error"], 5), f"{one['name']} is shown with {shown}, but has {one['rel_error']}")
        zeros = number(re.search(r"([\d.]+) % zeros", told)[0])
        look.check(near(zeros, 100 * one["zeros"] / one["elements"], 2), f"{one['name']} is shown with {zeros} % zeros")
    look.check(seen == len(errors), f"{seen} of {len(errors)} cells were found")
    look.page.keyboard.press("Escape")
    look.check("arrow keys" in look.text("p.readout"), "Escape does not leave the map")


def main():
    programs = pathlib.Path(sys.argv[1]).resolve()
    pictures = pathlib.Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else None
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("page: no Chromium (Debian: chromium), and CHROMIUM names none")
    wrong = []
    with work_folder() as folder, sync_playwright() as playwright:
        for model in ["llama-tiny", "qwen2-tiny"]:
            shutil.copytree(TINY / model, folder / model)
        jobs = {
            "done": job(folder, "done", folder / "llama-tiny", 'name = "sparsegpt"', 16),
            "failed": job(folder, "failed", with_a_nan(TINY / "opt-tiny", folder / "broken"), 'name = "sparsegpt"', 16),
            "running": job(folder, "running", folder / "qwen2-tiny", 'name = "espalier"\nprofile = "best"', 512),
        }
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with cluster(programs, folder) as (page, submit):

            def states():
                fleet = json.load(urllib.request.urlopen(f"{page}/api/state"))["fleet"]
                return {run["model"].split("/")[-1]: run for run in fleet["runs"]}

            # One after the other, so that the last is the one that goes on.
            for count, path in enumerate(jobs.values(), 1):
                submit(path)
                wait_for(f"run of {path}", lambda count=count: len(states()) == count)

            def settled():
                found = states()
                is_on = found["qwen2-tiny"]["state"] == "running" and found["qwen2-tiny"]["committed"] > 0
                return found if found["llama-tiny"]["state"] == "done" and is_on else None

            found = wait_for("run that is done and one that goes on", settled)
            names = {state: found[model]["run"] for state, model in [("done", "llama-tiny"), ("failed", "broken"), ("running", "qwen2-tiny")]}
            report = json.load(urllib.request.urlopen(f"{page}/api/report?run={names['done']}"))
            for state, run in names.items():
                for scheme, size, width in [("light", DESK, "desk"), ("dark", DESK, "desk"), ("light", PHONE, "phone")]:
                    look = Look(browser, f"{page}/#{run}", scheme, size, pictures)
                    look.page.wait_for_selector(".progress")
                    look.has_no_sideways_scrolling()
                    look.has_the_colours_of(scheme)
                    look.check(WORDS[state] in look.text(".title"), f"it does not say that the run is {state}: {look.text('.title')!r}")
                    listed = look.page.locator("#runs button").all_inner_texts()
                    look.check(len(listed) == 3, f"it lists {listed}")
                    if state == "done" and width == "desk":
                        figures_are_those_of(look, report)
                    if state == "failed":
                        alarm = look.text("p.alarm")
                        look.check(f"exit code {FAILED}" in alarm and "layers.1." in alarm, f"it says {alarm!r}")
                    if state == "running":
                        look.check("left" in look.text(".progress") or "elapsed" in look.text(".progress"), "it tells no time")
                    wrong += look.end(f"{state}-{width}-{scheme}")
            frozen = folder / "report.html"
            frozen.write_bytes(urllib.request.urlopen(f"{page}/report?run={names['done']}").read())
        # Nobody serves anything any more.
        look = Look(browser, frozen.as_uri(), "light", DESK, pictures)
        figures_are_those_of(look, report)
        look.check("done" in look.text(".title"), "the frozen run is not done")
        wrong += look.end("frozen")
        browser.close()
    for one in wrong:
        print(f"page: {one}", file=sys.stderr)
    if wrong:
        sys.exit(1)
    print(f"page: three runs, in light and dark, at desk and phone width, show what is in the report ({len(report['sublayers'])} cells)")


main()
