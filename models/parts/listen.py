"""What a training run lets one hear: sentences spoken on the way, in files, in TensorBoard and on one page.

    samples/step_0000120_0.wav      sentence 0 after 120 steps, and the same as .flac
    samples/recording_0.flac        what was said in truth, where there is a recording
    samples/listen.html             all of it in one file: a slider over the steps, A and B by key

Step 0 is the base: a fresh adapter changes nothing. A sample is no reason to lose a run, nor to wait long.
"""
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from models.parts import Invalid, audio, page
from models.parts.run import Log
from models.parts.textfiles import one_line

SHARE = 0.1  # of the time since the last samples: more would be felt as a slower run
LEAST_SECONDS = 10  # that may always be spent: no share of a few seconds would let a word be said
FIRST_SECONDS = 60  # for the first samples, before which there was no time to take a share of
PAGE_STEPS = 40  # on the page, evenly spread: a step has some hundred kB per sentence, and the file is one
NAME = re.compile(r"step_(\d+)_(\d+)")


class Sentence(NamedTuple):
    """A text to speak, and the row whose voice and recording it comes with."""

    text: str
    row: dict  # what model.sample_request looks at
    has_recording: bool


def sentences(rows) -> list[Sentence]:
    """Of rows with a text: a single clip as it is, of a conversation the last turn that has audio."""
    found = []
    for row in rows:
        with_audio = [turn for turn in row.get("turns", [row]) if turn.get("audio")]
        spoken = with_audio[-1] if with_audio else row
        if spoken.get("text"):
            found.append(Sentence(spoken["text"], spoken, isinstance(spoken.get("audio"), str)))
    return found


def further(texts, rows) -> list[Sentence]:
    """Sentences of texts that nobody has recorded, in the voice of the first row that has a text."""
    voices = sentences(rows)
    row = voices[0].row if voices else {}
    return [Sentence(text, {**row, "text": text}, False) for text in map(one_line, texts)]


@dataclass
class Samples:
    """Speaks the same sentences with the same seed again and again, as the model changes. Rank 0 only."""

    sentences: list[Sentence]
    seed: int
    log: Log
    ended: float = field(default_factory=time.perf_counter)  # when the last samples were done
    steps: int = 0  # how often it has spoken

    @property
    def folder(self):
        return self.log.root / "samples"

    def try_to_speak(self, model, step):
        """What goes wrong is only said."""
        began = time.perf_counter()
        least = LEAST_SECONDS if self.steps else FIRST_SECONDS
        seconds = max(least, SHARE * (began - self.ended))
        try:
            made = self.speak(model, step, began + seconds)
            took = time.perf_counter() - began
            self.log.say(f"step {step}: spoke {made} of {len(self.sentences)} samples in {took:.1f} s; "
                         f"{self.folder / 'listen.html'}")
        except (Invalid, OSError, RuntimeError) as e:
            cause = str(e).splitlines()[0]
            self.log.say(f"step {step}: no sample of the validation texts: {cause}", "warning")
        model.codec.to("cpu")
        model.train()
        self.steps += 1
        self.ended = time.perf_counter()

    @torch.no_grad()
    def speak(self, model, step, deadline):
        """All sentences, as far as there is time, and the page. -> how many"""
        model.eval()
        self.folder.mkdir(exist_ok=True)
        made = 0
        for number, sentence in enumerate(self.sentences):
            wave, whole = self.take(model, sentence, deadline)
            self.keep(wave, model.out_sample_rate, step, number)
            made += 1
            left = len(self.sentences) - made
            if not whole:
                self.log.say(f"step {step}: sample {number} was cut: samples may take a tenth of the time "
                             "since the last ones", "warning")
            if left and time.perf_counter() > deadline:
                self.log.say(f"step {step}: {left} samples were left out, for the same reason", "warning")
                break
        write_page(self.folder, self.sentences, step)
        return made

    def take(self, model, sentence, deadline):
        """(wave, whether it is whole): chunks as they come, until the time is over."""
        chunks = []
        for chunk in model.generate(sentence.text, **model.sample_request(sentence.row), seed=self.seed):
            chunks.append(chunk)
            if time.perf_counter() > deadline:
                return torch.cat(chunks), False
        return (torch.cat(chunks) if chunks else torch.zeros(1)), True

    def keep(self, wave, rate, step, number):
        """Files and TensorBoard; the first time with the recording."""
        for kind in ("wav", "flac"):
            audio.write(self.folder / f"step_{step:07d}_{number}.{kind}", wave, rate)
        tag, picture = f"val_sample_{number}", audio.mel_picture(wave, rate)
        self.log.show("add_audio", f"{tag}/generated_audio", wave[None], step, rate)
        self.log.show("add_image", f"{tag}/mel_spectrogram", picture, step, dataformats="CHW")
        sentence = self.sentences[number]
        if self.steps or not sentence.has_recording:
            return
        row = sentence.row
        recording, rate = audio.read(row["audio"], None, row.get("start"), row.get("end"))
        audio.write(self.folder / f"recording_{number}.flac", recording, rate)
        self.log.show("add_audio", f"{tag}/reference_audio", recording[None], step, rate)


# ------------------------------------------------------------------------------------------------ the page


def write_page(folder, sentences, step):
    """listen.html, made anew from the files that lie there: those of later steps belong to an earlier run."""
    takes = {}  # number of a sentence -> {step: file}
    for path in sorted(Path(folder).glob("step_*.flac")):
        match = NAME.fullmatch(path.stem)
        if match and int(match[1]) <= step:
            takes.setdefault(int(match[2]), {})[int(match[1])] = path
    steps = spread(sorted(set().union(*takes.values())), PAGE_STEPS)
    pieces = []
    for number, sentence in enumerate(sentences):
        kept = {step: path for step, path in takes.get(number, {}).items() if step in steps}
        files = {f"step {step}" if step else "step 0, the base": path for step, path in kept.items()}
        recording = Path(folder) / f"recording_{number}.flac"
        if sentence.has_recording and recording.is_file():
            files = {"recording": recording, **files}
        pieces.append(sentence_piece(f"{number + 1}. {sentence.text}", files))
    text = page.page("Listen", BAR, *pieces, LOOKS, SCRIPT)
    page.write(Path(folder) / "listen.html", text)


def spread(steps, most):
    """At most so many of the steps, evenly, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def sentence_piece(title, files):
    """Every take of a sentence, {name: file}; the script shows two of them beside each other."""
    takes = []
    for name, path in files.items():
        wave, rate = audio.read(path)
        shown = page.sound(path.read_bytes(), "audio/flac") + page.picture(audio.mel_picture(wave, rate)[0])
        name = page.escape(name)
        takes.append(f'<div class="take" data-name="{name}"><b>{name}</b>{shown}</div>')
    return page.section(title, f'<div class="grid takes">{"".join(takes)}</div>')


BAR = """<div id="bar" hidden><label>A: <select id="first"></select></label>
<label>B: <b id="name"></b> <input type="range" id="slider" min="0" value="0"></label>
<span class="quiet">Keys: <b>a</b> and <b>b</b> play from the same place, <b>space</b> stops,
<b>&larr; &rarr;</b> other steps, <b>&uarr; &darr;</b> other sentences.</span></div>"""
LOOKS = """<style>
#bar { position: sticky; top: 0; padding: 8px 0; background: Canvas; z-index: 1 }
#bar:not([hidden]) { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center }
#bar input { width: 240px; max-width: 100%; vertical-align: middle } #bar select { font: inherit }
section.chosen h2 { border-color: var(--ink); color: var(--ink) }
.take b { display: block } .take img { width: 100%; height: 90px; border-radius: 4px }
.take.empty { opacity: .4 } .take.empty img { visibility: hidden }
</style>"""
SCRIPT = """<script>
(() => {
  const $ = id => document.getElementById(id), names = [];
  const sections = [...document.querySelectorAll("section")].map(section => {
    const grid = section.querySelector(".takes"), takes = {};
    for (const take of grid.children) {
      takes[take.dataset.name] = [take.querySelector("audio").src, take.querySelector("img").src];
      if (!names.includes(take.dataset.name)) names.push(take.dataset.name);
    }
    grid.innerHTML = "";
    const slots = ["A", "B"].map(letter => {
      const slot = document.createElement("div");
      slot.className = "take";
      slot.innerHTML = "<b></b><audio controls></audio><img alt=''>";
      slot.letter = letter;
      grid.append(slot);
      return slot;
    });
    section.onclick = () => choose(sections.findIndex(s => s.section === section));
    return { section, takes, slots };
  });
  const steps = names.filter(name => name !== "recording")
    .sort((a, b) => parseInt(a.slice(5)) - parseInt(b.slice(5)));
  if (!steps.length) return;
  let chosen = 0;
  function put(slot, takes, name) {
    const [sound, picture] = takes[name] || ["", ""], audio = slot.querySelector("audio");
    slot.classList.toggle("empty", !sound);
    slot.querySelector("b").textContent = `${slot.letter}: ${name}${sound ? "" : " (none)"}`;
    if (slot.name === name) return;
    slot.name = name;
    slot.querySelector("img").src = picture;
    if (sound) audio.src = sound; else audio.removeAttribute("src");
  }
  function show() {
    const name = steps[$("slider").value];
    $("name").textContent = name;
    for (const { takes, slots } of sections) {
      put(slots[0], takes, $("first").value);
      put(slots[1], takes, name);
    }
  }
  function choose(number) {
    chosen = (number + sections.length) % sections.length;
    sections.forEach((s, i) => s.section.classList.toggle("chosen", i === chosen));
  }
  function play(which) {
    const [one, other] = [which, 1 - which].map(i => sections[chosen].slots[i].querySelector("audio"));
    if (!one.src) return;
    const place = other.paused ? 0 : other.currentTime;
    document.querySelectorAll("audio").forEach(audio => audio.pause());
    one.currentTime = place < one.duration ? place : 0;
    one.play();
  }
  const stop = () => document.querySelectorAll("audio").forEach(audio => audio.pause());
  function move(by) { $("slider").value = Number($("slider").value) + by; show(); }
  $("slider").max = steps.length - 1; $("slider").value = steps.length - 1;
  const recorded = names.includes("recording") ? ["recording"] : [];
  for (const name of [...recorded, ...steps]) $("first").add(new Option(name));
  $("first").value = steps[0];
  $("slider").oninput = $("first").onchange = show;
  $("bar").hidden = false;
  document.addEventListener("keydown", e => {
    if (e.ctrlKey || e.metaKey || e.altKey || e.target.tagName === "SELECT") return;
    const acts = { a: () => play(0), b: () => play(1), " ": stop,
      ArrowLeft: () => move(-1), ArrowRight: () => move(1),
      ArrowUp: () => choose(chosen - 1), ArrowDown: () => choose(chosen + 1) };
    if (acts[e.key]) { e.preventDefault(); acts[e.key](); }
  });
  choose(0); show();
})();
</script>"""
