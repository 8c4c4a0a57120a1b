"""One HTML page that needs nothing but itself: tables, histograms as inline SVG, and sound in the page.

    html = page("Data", section("Clips", facts({"hours": 2.7}), histogram(seconds, "duration"), table(...)))

Every function returns a piece of HTML; text that is passed in is escaped, pieces are put together as they
are. No script, no font, no address of another file: the page can be mailed. It fits a telephone (400 px) as
well as a desk.
"""
import base64
import html
import io
import math
import struct
import zlib

import soundfile
import torch

from models.parts.plain import write_file

TABLE_ROWS = 500  # more of them nobody reads, and a browser takes seconds to lay them out
LONG = 40  # characters of a cell that is read as a text and needs some width, on a telephone too
BINS = 24  # of a histogram: about as wide as a finger on a telephone
TAIL_PART = 200  # of the values, on each side, may be wild without flattening all the others: 0.5 %
WIDTH, HEIGHT, BASE = 280, 90, 110  # of the bars in a histogram, and the line they stand on, in its view box
INK = "#2b6cb0"
STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: #2b6cb0; --soft: #8882 }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 12px }
body { overflow-wrap: anywhere } h1 { font-size: 1.5em; margin: .4em 0 }
h2 { font-size: 1.15em; border-bottom: 1px solid var(--line); margin: 1.6em 0 .6em }
p { margin: .5em 0 } .quiet { opacity: .7 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 8px }
.facts { margin-bottom: 12px } .facts b { display: block; font-size: 1.2em }
.facts div { background: var(--soft); border-radius: 6px; padding: 6px 10px }
.wide { overflow-x: auto; max-width: 100% } table { border-collapse: collapse; width: 100%; font-size: .92em }
th, td { text-align: left; vertical-align: top; padding: 3px 8px; min-width: 4em }
th, td { border-bottom: 1px solid var(--line); overflow-wrap: break-word }
h1, h2, th, .facts div { overflow-wrap: break-word } th { overflow-wrap: normal }
figure { margin: 0 } figcaption { font-size: .9em }
td.t { min-width: 14em }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: currentColor }
audio { width: 260px; max-width: 100%; height: 32px }
"""


def escape(value):
    """Text for HTML; what no file can hold (a lone surrogate) is shown as U+FFFD."""
    return html.escape(str(value).encode("utf-8", "replace").decode().replace("\0", "\ufffd"))


def page(title, *pieces):
    """The whole document as text."""
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
            + "\n".join(pieces) + "\n</body></html>\n")


def section(title, *pieces):
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(pieces) + "</section>"


def grid(*pieces):
    """Pieces side by side where there is room."""
    return '<div class="grid">' + "".join(pieces) + "</div>"


def text(words, quiet=False):
    return f'<p class="quiet">{escape(words)}</p>' if quiet else f"<p>{escape(words)}</p>"


def facts(pairs):
    """{name: value} as a row of boxes."""
    boxes = (f"<div><b>{escape(number(v))}</b>{escape(k)}</div>" for k, v in pairs.items())
    return f'<div class="facts">{"".join(boxes)}</div>'


def write(path, text):
    """A page that appears whole or not at all: a browser may be reading it."""
    write_file(path, text.encode("utf-8", "replace"))


class Piece(str):
    """HTML that is ready, such as a player in a table's cell."""


def table(headers, rows, empty="none"):
    """Rows of cells; numbers stand on the right, a Piece goes in as it is. Too many are counted, not
    shown."""
    if not rows:
        return text(empty, quiet=True)
    shown = rows[:TABLE_ROWS]
    css = []
    for column in zip(*shown):
        numbers = all(isinstance(value, (int, float)) for value in column)
        longest = max(0 if isinstance(value, Piece) else len(str(value)) for value in column)
        kind = "n" if numbers else ""
        kind = "t" if longest > LONG else kind
        css.append(f'class="{kind}"' if kind else "")
    head = "".join(f"<th {c}>{cell(title)}</th>" for c, title in zip(css, headers))
    body = ""
    for row in shown:
        cells = (f"<td {c}>{cell(value)}</td>" for c, value in zip(css, row))
        body += f"<tr>{''.join(cells)}</tr>\n"
    more = text(f"and {len(rows) - len(shown)} more", quiet=True) if len(rows) > len(shown) else ""
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    return f'<div class="wide">{whole}</div>{more}'


def cell(value):
    return value if isinstance(value, Piece) else escape(number(value))


def number(value):
    """A float with four digits that mean something; anything else as it is."""
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e6 else value


def bins(values):
    """Edges and counts of a histogram; the outermost 0.5 % on each side count in the first and last bin."""
    values = sorted(value for value in values if math.isfinite(value))
    if not values:
        return [0.0, 1.0], [0]
    wild = len(values) // TAIL_PART
    low, high = values[wild], values[-1 - wild]
    count = 1 if low == high else BINS
    edges = [low + (high - low) * i / count for i in range(count)] + [high]
    counts = [0] * count
    for value in values:
        i = int((value - low) / (high - low or 1) * count)
        counts[min(count - 1, max(0, i))] += 1
    return edges, counts


def histogram(values, label):
    """Bars, or nothing where all values are zero: a single bar would look like a finding."""
    if not any(values):
        return ""
    edges, counts = bins(values)
    top, width = max(max(counts), 1), WIDTH / len(counts)
    bars = ""
    for i, count in enumerate(counts):
        if not count:
            continue
        x, height = 10 + i * width, HEIGHT * count / top
        place = f'x="{x:.1f}" y="{BASE - height:.1f}" width="{max(width - 1, 1):.1f}" height="{height:.1f}"'
        title = f"{edges[i]:.4g} to {edges[i + 1]:.4g}: {count}"
        bars += f'<rect {place} fill="{INK}"><title>{title}</title></rect>'
    axis = ('<path d="M10 110H290" stroke="currentColor" fill="none"/>'
            f'<text x="10" y="124">{edges[0]:.4g}</text>'
            f'<text x="290" y="124" text-anchor="end">{edges[-1]:.4g}</text><text x="10" y="14">{top}</text>')
    return figure("0 0 300 130", bars + axis, escape(label))


def figure(box, drawn, caption):
    return f'<figure><svg viewBox="{box}" role="img">{drawn}</svg><figcaption>{caption}</figcaption></figure>'


def player(wave, rate):
    """(n,) samples in [-1, 1] as a player that holds its sound (PCM 16)."""
    data = io.BytesIO()
    samples = (wave * 32767).round().clamp(-32768, 32767).short().numpy()
    soundfile.write(data, samples, int(rate), format="WAV", subtype="PCM_16")
    coded = base64.b64encode(data.getvalue()).decode()
    return Piece(f'<audio controls preload="none" src="data:audio/wav;base64,{coded}"></audio>')


def sound(data, kind):
    """The bytes of a sound file as a player that holds them. kind: audio/flac, audio/wav."""
    coded = base64.b64encode(data).decode()
    return Piece(f'<audio controls preload="none" src="data:{kind};base64,{coded}"></audio>')


def picture(pixels):
    """(H, W) values in [0, 1], 0 black, as a grey picture that is in the page (PNG)."""
    height, width = pixels.shape
    grey = (pixels * 255).round().to(torch.uint8)
    rows = torch.nn.functional.pad(grey, (1, 0))  # each row begins with the number of its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.numpy().tobytes())), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, content) for name, content in parts)
    return Piece(f'<img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">')


def _png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
