"""
Curves of runs, from their log.jsonl: a picture by matplotlib (Hunter 2007), or a sketch in characters.

    python data/runlog.py out-a out-b
"""

import argparse
import json
import os
import shutil
import time
import warnings
from string import ascii_lowercase as LETTERS
from typing import NamedTuple

import numpy as np

from data import DataError, writing

COLORS = '#1f5fa8', '#c4501b', '#2e8540', '#7b4fa3', '#9a7b00', '#008a8a', '#b03a6e', '#555555'


class Curve(NamedTuple):
    """What the log of a run says. An update counts from 1: after it that many are done."""
    name: str
    title: str
    tokens: int  # of an update; 0 if unknown
    updates: np.ndarray  # (n, 4): updates done; loss, learning rate and gradient norm of the last of them
    evals: np.ndarray  # (m, 3): updates done, train loss, val loss


def read(folder: str) -> Curve:
    """The curve of the run in an out_dir. DataError if it has no log, or nothing in it."""
    path = os.path.join(folder, 'log.jsonl')
    config, updates, evals = {}, [], []
    try:
        with open(path, encoding='utf-8-sig', errors='replace') as f:
            for line in f:
                try:
                    record = json.loads(line)
                    if record['kind'] == 'run':
                        config = record.get('config') or {}
                    elif record['kind'] == 'train':
                        updates.append([float(record[key]) for key in ('iter', 'loss', 'lr', 'norm')])
                    elif record['kind'] == 'eval':
                        evals.append([float(record[key]) for key in ('iter', 'train/loss', 'val/loss')])
                except (ValueError, KeyError, TypeError):  # a line that a kill cut, or of another program
                    continue
    except OSError as e:
        raise DataError(f'{path} cannot be read ({e.strerror}): name the out_dir of a run') from e
    if not updates and not evals:
        raise DataError(f'{path} holds no updates and no evaluations yet')
    tokens = config.get('gradient_accumulation_steps', 0) * config.get('batch_size', 0) * config.get('block_size', 0)
    shape = ', '.join(f'{key}={config[key]}' for key in ('dataset', 'n_layer', 'n_head', 'n_embd') if key in config)
    updates = np.array(updates, float).reshape(-1, 4) + [1, 0, 0, 0]
    return Curve(os.path.basename(os.path.abspath(folder)), shape, tokens, updates,
                 np.array(evals, float).reshape(-1, 3))


def _thinned(points: np.ndarray, most: int = 1000) -> np.ndarray:
    """At most so many rows: each the mean of some neighbours."""
    size = max(1, -(-len(points) // most))
    return np.array([points[i:i + size].mean(0) for i in range(0, len(points), size)]).reshape(-1, points.shape[1])


def _best(evals: np.ndarray) -> np.ndarray | None:
    """The row with the lowest val loss."""
    finite = evals[np.isfinite(evals[:, 2])]
    return finite[finite[:, 2].argmin()] if len(finite) else None


def _scales(curves: list[Curve]) -> tuple[str, list[int]]:
    """What to draw over, and how many of it an update is: tokens, if updates of different sizes are to be compared."""
    sizes = [curve.tokens for curve in curves]
    return ('tokens', sizes) if len(set(sizes)) > 1 and all(sizes) else ('updates', [1] * len(curves))


def picture(curves: list[Curve]):
    """A matplotlib figure of one run or several. ImportError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter
    unit, scales = _scales(curves)
    figure = Figure((9, 7), dpi=110, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    loss, rate, norm = figure.subplots(3, sharex=True, height_ratios=(7, 2, 2))
    for i, curve in enumerate(curves):
        alone, scale = len(curves) == 1, scales[i]
        color, val_color = COLORS[i % len(COLORS)], COLORS[(i + alone) % len(COLORS)]
        line = ('-', '--', ':', '-.')[i // len(COLORS) % 4]
        updates, best = _thinned(curve.updates), _best(curve.evals)
        x, evals_x = updates[:, 0] * scale, curve.evals[:, 0] * scale
        loss.plot(x, updates[:, 1], color='#bbbbbb' if alone else color, alpha=1 if alone else 0.3, linewidth=0.7,
                  label='train, as logged' if alone else None)
        marker = 'o' if len(evals_x) < 60 else None
        if alone:
            loss.plot(evals_x, curve.evals[:, 1], color=color, linewidth=2, marker=marker, markersize=3,
                      label='train, evaluated')
        loss.plot(evals_x, curve.evals[:, 2], line, color=val_color, linewidth=2, marker=marker, markersize=3,
                  label='val, evaluated' if alone else curve.name if best is None else None)
        if best is not None:
            loss.plot(best[0] * scale, best[2], color=val_color, marker='*', markersize=14, linestyle='none',
                      markeredgecolor='white', zorder=5,
                      label=f'{"" if alone else curve.name + ", "}best val: {best[2]:.4f} after '
                            f'{best[0] * scale:,.0f} {unit}')
        rate.plot(x, updates[:, 2], color=color, linewidth=1.2)
        norm.plot(x, updates[:, 3], color=color, linewidth=0.7, alpha=1 if alone else 0.6)
    for axes, name in ((loss, 'loss (nats a token)'), (rate, 'learning rate'), (norm, 'gradient norm')):
        axes.set_ylabel(name, fontsize=10 if axes is loss else 9)
        axes.grid(color='#e6e6e6')
        axes.set_axisbelow(True)
        axes.spines[['top', 'right']].set_visible(False)
    rate.ticklabel_format(axis='y', scilimits=(0, 0))
    rate.set_ylim(bottom=0)
    norms = np.concatenate([curve.updates[:, 3] for curve in curves])
    usual = np.percentile(norms[np.isfinite(norms)], 99) if np.isfinite(norms).any() else 1.0
    norm.set_ylim(0, 1.5 * usual or 1)  # a spike may leave the picture
    norm.set_xlabel(unit)
    norm.xaxis.set_major_locator(MaxNLocator(integer=True))
    norm.xaxis.set_major_formatter(EngFormatter(sep='') if unit == 'tokens' else StrMethodFormatter('{x:,.0f}'))
    if unit == 'updates' and (tokens := curves[0].tokens) and {curve.tokens for curve in curves} == {tokens}:
        top = loss.secondary_xaxis('top', functions=(lambda x: x * tokens, lambda x: x / tokens))
        top.set_xlabel('tokens')
        top.set_zorder(1)  # over the grid
        top.xaxis.set_major_formatter(EngFormatter(sep=''))
    loss.legend(frameon=False)
    loss.set_title(f'{curves[0].name}: {curves[0].title}' if len(curves) == 1 else
                   'val loss; pale: train loss, as logged', fontsize=11)
    figure.align_ylabels()
    return figure


def draw(curves: list[Curve], path: str) -> None:
    """Write their picture, as its ending says. ImportError without matplotlib, DataError if it cannot be written."""
    import matplotlib
    try:  # a name may hold any characters: $ starts no formula, and one that no font has is a box
        with writing(path), warnings.catch_warnings(), matplotlib.rc_context({'text.parse_math': False}):
            warnings.simplefilter('ignore', UserWarning)
            picture(curves).savefig(path + '.tmp', format=os.path.splitext(path)[1][1:])
        os.replace(path + '.tmp', path)
    except (OSError, ValueError) as e:  # no such folder, no such format
        raise DataError(f'{path} cannot be written ({e})') from e


def redraw(folder: str) -> float:
    """Draw loss.png of the run in an out_dir, if matplotlib is there; no failure ends it. Returns seconds it took."""
    began = time.perf_counter()
    try:
        draw([read(folder)], os.path.join(folder, 'loss.png'))
    except ImportError:
        pass
    except Exception as e:
        print(f'loss.png could not be drawn ({type(e).__name__}: {" ".join(str(e).split())[:120]})')
    return time.perf_counter() - began


def sketch(curves: list[Curve], width: int = 78, height: int = 20) -> str:
    """The losses of up to 26 runs in characters: letters are val loss, large where it is lowest, dots train loss."""
    unit, scales = _scales(curves)
    points = []  # x, y, character; later ones lie on top
    for letter, curve, scale in zip(LETTERS, curves, scales):
        points += [(x * scale, y, '.') for x, y in _thinned(curve.updates, 2 * width)[:, :2]]
        points += [(x * scale, y, letter) for x, _, y in curve.evals]
    bests = [_best(curve.evals) for curve in curves]
    points += [(best[0] * scale, best[2], letter.upper())
               for letter, best, scale in zip(LETTERS, bests, scales) if best is not None]
    points = [point for point in points if np.isfinite(point[:2]).all()]
    if not points:
        return 'no loss is finite'
    low, high, last = (f(p[i] for p in points) for f, i in ((min, 1), (max, 1), (max, 0)))
    grid = [[' '] * width for _ in range(height)]
    for x, y, character in points:
        row = round((high - y) / (high - low or 1) * (height - 1))
        grid[row][round(x / (last or 1) * (width - 1))] = character
    at = {0: f'{high:7.3f}', height - 1: f'{low:7.3f}'}
    lines = [f'{"loss":>7} |', *(f'{at.get(i, ""):7} |{"".join(row).rstrip()}' for i, row in enumerate(grid))]
    lines += [' ' * 8 + '+' + '-' * width, f'{"":9}0{f"{last:,.0f} {unit}":>{width - 1}}']
    for letter, curve, best, scale in zip(LETTERS, curves, bests, scales):
        lines.append(f'{letter}: {curve.name}' + ('' if best is None else f', best val loss {best[2]:.4f} '
                                                  f'({letter.upper()}) after {best[0] * scale:,.0f} {unit}'))
    return '\n'.join([*lines, 'letters: val loss, dots: train loss, as logged'])


def main() -> None:
    parser = argparse.ArgumentParser(prog='runlog.py', description='Draw the curves of runs into one picture, or, '
                                     'where matplotlib is not installed, in the terminal.')
    parser.add_argument('out_dirs', nargs='+', help='folders with a log.jsonl')
    parser.add_argument('--to', default='loss.png', help='the file to write, loss.png by default')
    given = parser.parse_args()
    curves = [read(folder) for folder in given.out_dirs]
    if len({curve.name for curve in curves}) < len(curves):
        curves = [curve._replace(name=folder) for curve, folder in zip(curves, given.out_dirs)]
    try:
        draw(curves, given.to)
        print(f'wrote {given.to}')
    except ImportError:
        print(sketch(curves, max(20, shutil.get_terminal_size((88, 24)).columns - 10)))
        print('(for a picture: pip install matplotlib)')
