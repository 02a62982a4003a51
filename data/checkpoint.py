"""A plain dict to disk and back: saved atomically, verified when read."""

import contextlib
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.utils._pytree import tree_leaves, tree_map

from data import FULL, NAMES, DataError, writing


@contextlib.contextmanager
def saving(path: str, checkpoint: dict, device_type: str = 'cpu') -> Iterator[None]:
    """
    Write the dict to `path` so that at any moment the old file or the new one is whole there. A thread begins it while
    the body of the with statement runs, which must not change the tensors; then the new file, durable, takes the place
    of the old one, and a new ckpt.pt takes away last.pt. If the body raises, or the file cannot be written (DataError),
    the old ones stand.
    """
    # on the GPU's main stream, copies to the host would queue behind all that the body has begun to compute
    stream = torch.cuda.Stream() if device_type == 'cuda' else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream())

    def write():
        if stream:
            torch.cuda.set_stream(stream)
        with open(path + '.tmp', 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())

    with writing(path), ThreadPoolExecutor(1) as pool:  # its end waits for the thread
        begun = pool.submit(write)
        if device_type == 'mps':  # takes one thread at a time
            pool.shutdown()
        yield
        _replace(path, begun)


def _replace(path: str, begun: Future) -> None:
    """Put path.tmp, once it is written, in the place of `path`."""
    try:
        begun.result()
        os.replace(path + '.tmp', path)
        if hasattr(os, 'O_DIRECTORY'):  # the new name itself must survive a power cut too
            folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # some network disks cannot do that
                os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as e:  # torch's writer turns some write errors into RuntimeError
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        kept = '; the one that stood there is intact' if os.path.exists(path) else ''
        space = 'free some space or ' if getattr(cause, 'errno', None) in FULL else ''
        raise DataError(f'{path} could not be written ({cause}){kept}: {space}choose another --out_dir',
                        one_rank=True) from e
    if os.path.basename(path) == 'ckpt.pt':
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(os.path.dirname(path), 'last.pt'))


def _checksums(value) -> set[int]:
    """CRC-32 of every tensor storage below a value, on as many threads as there are processors."""
    storages = [t.untyped_storage() for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
    storages = {s.data_ptr(): s for s in storages}.values()  # each once
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return set(pool.map(lambda s: zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(s).numpy()), storages))


def _plain(value) -> bool:
    """Whether a value holds dicts, lists, scalars, text and tensors only, each element of which has its own place."""
    if isinstance(value, dict):
        return all(type(k) in (str, int) and _plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, torch.Tensor):
        return (value.layout == torch.strided and value.device.type == 'cpu' and not value.is_quantized
                and not value.is_complex() and torch.empty_like(value, device='meta').stride() == value.stride())
    return value is None or type(value) in (bool, int, float, str)


def load(path: str, mmap: bool = False) -> dict:
    """
    The dict that saving() wrote, tensors on the CPU; with mmap they stay in the file, which must outlive them. Every
    byte is checked against its CRC, and the pickle may build plain types and tensors only, so a file from a stranger
    runs no code. Raises DataError naming the file, its size and the other checkpoint of the run, if there is one.
    """
    folder, name = os.path.split(path)
    spare = [os.path.join(folder, n) for n in NAMES if n != name and os.path.isfile(os.path.join(folder, n))]
    size = f'{os.path.getsize(path):,} bytes' if os.path.isfile(path) else 'not a file'
    hint = f'; {spare[0]} stands beside it, move this one away to use that' if spare and name in NAMES else ''
    try:
        if not zipfile.is_zipfile(path):
            with open(path, 'rb') as f:
                lfs = '; it is a pointer of git-lfs: run git lfs pull' if f.read(7) == b'version' else ''
            raise DataError(f'{path} ({size}) is damaged or not a checkpoint{lfs}{hint}')
        with zipfile.ZipFile(path) as z:
            stored = {entry.CRC for entry in z.infolist() if '/data/' in entry.filename}
            for entry in z.infolist():  # the pickle before anything is built from it
                if '/data/' not in entry.filename:
                    with z.open(entry) as f:
                        while f.read(1 << 20):  # the end of it raises if the checksum differs
                            pass
        # mapped, a name that is no UTF-8 is an error to torch
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap and path.isprintable())
        # torch parses the zip by itself: what counts is that the bytes it returned have the checksums read above
        if _checksums(checkpoint) != stored:
            raise DataError(f'{path} ({size}) is damaged: its tensors do not match their checksums{hint}')
        if not isinstance(checkpoint, dict) or not _plain(checkpoint):
            raise DataError(f'{path} ({size}) is not a checkpoint: more than plain values and dense tensors{hint}')
        if problem := _problem(checkpoint):
            raise DataError(f'{path} ({size}) cannot be used: {problem}{hint}')
        return checkpoint
    except DataError:
        raise
    except Exception as e:  # a broken file raises nearly anything
        if other := re.search(r'GLOBAL (\S+) ', str(e)):
            what = 'numpy scalars' if 'numpy' in other[1] else other[1]
            raise DataError(f'{path} holds {what}, which could run code and is not loaded: load it where it was made, '
                            'turn that into plain values, save it again') from e
        raise DataError(f'{path} ({size}) is damaged or not a checkpoint ({type(e).__name__}){hint}') from e


def _problem(checkpoint: dict) -> str | None:
    """What a dict lacks to be a checkpoint of train.py, or has too large for its own tensors."""
    fits = {**dict.fromkeys(('model', 'model_args', 'config'), lambda v: isinstance(v, dict) and all(
                type(name) is str for name in v)),
            'iter_num': lambda v: type(v) is int and 0 <= v < 1 << 62,
            'best_val_loss': lambda v: type(v) is float or type(v) is int and abs(v) < 1 << 62 or (
                isinstance(v, torch.Tensor) and v.ndim == 0)}
    wrong = [f'{k} missing' for k in ('model', 'model_args') if k not in checkpoint]
    wrong += [f'{k} of another type' for k, right in fits.items() if k in checkpoint and not right(checkpoint[k])]
    if wrong:
        return ', '.join(wrong)
    args, tensors = checkpoint['model_args'], {k: t for k, t in checkpoint['model'].items() if hasattr(t, 'dtype')}
    numbers = sum(t.numel() for t in tensors.values())
    most = {'n_layer': len(tensors), **dict.fromkeys(('n_head', 'n_embd', 'block_size', 'vocab_size'), numbers)}
    wrong = [f'{k}={args[k]}, but its {len(tensors)} tensors hold {numbers:,} numbers' for k in most
             if type(args.get(k)) is int and args[k] > most[k]]
    for k, t in tensors.items():
        if not t.is_floating_point() and not k.endswith(('.attn.bias', '.attn.masked_bias')):  # masks: not used
            wrong.append(f'{k} holds {t.dtype}')
        elif t.is_floating_point() and t.numel() and not t.abs().max().isfinite():
            wrong.append(f'{k} holds NaN or infinity, its run had failed before it was saved')
    return wrong[0] if wrong else None


def _paths(folder: str) -> list[str]:
    return [path for path in (os.path.join(folder, name) for name in NAMES) if os.path.lexists(path)]


def newest(folder: str, mmap: bool = False) -> dict | None:
    """The checkpoint in an out_dir that is further on, or None. Raises DataError if one is damaged."""
    found = {path: load(path, mmap) for path in _paths(folder)}
    if path := next((path for path, checkpoint in found.items() if 'iter_num' not in checkpoint), None):
        raise DataError(f'{path} has no iter_num: sample.py can use it, but no run can go on from it')
    return max(found.values(), key=lambda checkpoint: checkpoint['iter_num'], default=None)


def misfit(optimizer: torch.optim.Optimizer, stored) -> str | None:
    """What a stored AdamW state dict lacks, or has in another shape, for the parameters of `optimizer`, or None."""
    state = stored.get('state') if isinstance(stored, dict) else None
    if not isinstance(state, dict):
        return 'it has none'
    params = dict(enumerate(p for group in optimizer.param_groups for p in group['params']))
    for i, p in params.items():
        entry = state.get(i)
        if not isinstance(entry, dict) or entry.keys() != {'step', 'exp_avg', 'exp_avg_sq'}:
            return f'parameter {i} is missing'
        step = entry['step']
        if not (isinstance(step, torch.Tensor) and step.numel() == 1 or type(step) in (int, float)) or not step >= 0:
            return f'step of parameter {i} is {step}'
        for name in ('exp_avg', 'exp_avg_sq'):
            if getattr(entry[name], 'shape', None) != p.shape or not entry[name].is_floating_point():
                return (f'{name} of parameter {i} is {tuple(getattr(entry[name], "shape", ()))} of '
                        f'{getattr(entry[name], "dtype", "no tensor")}, the model needs {tuple(p.shape)} of float32')
    return next((f'parameter {i} is unknown' for i in state if i not in params), None)


def differences(checkpoint: dict, config: dict, digests: dict) -> list[str]:
    """How the options of a run, and its data by their sha256 sums, differ from the checkpoint that it resumes, a line
    each; the shape is the file's."""
    shape = _shape(checkpoint, config)
    lines = [f'{key}={value} comes from the checkpoint, {key}={config[key]} is ignored'
             for key, value in shape.items() if value != config[key]]
    silent = *shape, 'init_from', 'out_dir', 'eval_only'
    if _other_text(checkpoint, digests):
        lines.append(f'resumed on another text: dataset={config["dataset"]} has other sha256 sums than before')
    return lines + [f'resumed with {key}={config[key]}, it was {value}' for key, value in
                    checkpoint.get('config', {}).items() if key not in silent and config.get(key, value) != value]


def _shape(checkpoint: dict, config: dict) -> dict:
    """The options that the checkpoint's weights decide."""
    return {key: value for key, value in checkpoint['model_args'].items() if key != 'dropout' and key in config}


def _other_text(checkpoint: dict, digests: dict) -> bool:
    """Whether the data of a checkpoint's run is known, and is not this."""
    known = checkpoint.get('data')
    known = {k: v for k, v in known.items() if isinstance(v, str)} if isinstance(known, dict) else {}
    return any(known.get(split, sha256) != sha256 for split, sha256 in digests.items()
               if known.get(split, '').startswith('sampled') == sha256.startswith('sampled'))


def earlier(folder: str) -> str:
    """A hint at the files of an earlier run that claim() renamed, or nothing."""
    there = os.path.join(folder, 'ckpt.prev.pt')
    return f'{there} is of an earlier run, rename it to go on with that; or ' if os.path.exists(there) else ''


def to_sample(folder: str) -> tuple[str, dict]:
    """Path and content of the checkpoint to sample from: ckpt.pt, else last.pt; tensors stay on disk. Or DataError."""
    if not (paths := _paths(folder)):
        raise DataError(f'no ckpt.pt or last.pt in out_dir={folder}: {earlier(folder)}train first, or try '
                        '--init_from=gpt2')
    return paths[0], load(paths[0], mmap=True)


def to_resume(folder: str, config: dict, digests: dict, say: Callable = print, mmap: bool = False) -> dict:
    """
    The checkpoint of an out_dir that is further on, for a run with the options `config` on data with these sha256 sums;
    `say` gets a line for each difference; mmap: as for load(). With init_from=auto it is empty if there is none, or
    that of another run: of another shape, seed or text. Raises ValueError if they do not go together, or DataError if
    a file is damaged.
    """
    found, wanted = newest(folder, mmap), config['block_size']
    auto = config['init_from'] == 'auto' and not config['eval_only']  # nobody wants to evaluate a fresh model
    if found is None and auto:
        return {}
    if found is None:
        raise ValueError(f'init_from={config["init_from"]}: no ckpt.pt or last.pt in out_dir={folder}; '
                         f'{earlier(folder)}start with --init_from=scratch')
    was = {**found.get('config', {}), **_shape(found, config)}
    same = [*_shape(found, config), 'seed']
    if _other_text(found, digests) or not found.get('data'):  # a text may have several names
        same.append('dataset')
    if auto and (other := [key for key in same if was.get(key, config[key]) != config[key]]):
        say(f'out_dir={folder} holds another run ({other[0]}={was[other[0]]}): init_from=auto starts this one anew')
        return {}
    if (stored := found['model_args'].get('block_size', wanted)) != wanted:
        raise ValueError(f'block_size={wanted}, but the checkpoint has {stored}: resume with --block_size={stored}')
    if _other_text(found, digests) and was.get('dataset') == config['dataset']:
        raise ValueError(f'dataset={config["dataset"]} was prepared anew since the checkpoint in out_dir={folder} was '
                         'saved, from another text: give one of the two another name')
    for line in differences(found, config, digests):
        say(line)
    return found


def whole(state: dict, keep: bool) -> dict:
    """The state of model and optimizer; of a sharded run its DTensors are gathered, on the CPU of ranks that `keep`
    them; all ranks must call this."""
    def gather(t):
        full = t.full_tensor() if hasattr(t, 'full_tensor') else t
        return full if full is t else full.cpu() if keep else None
    state = tree_map(gather, state)
    state['model']['lm_head.weight'] = state['model']['transformer.wte.weight']  # tied: one tensor in the file, too
    return state


def restore(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, checkpoint: dict) -> None:
    """
    Give the optimizer its moments and steps, and the scaler its scale, from a checkpoint; hyperparameters stay as they
    are. Raises DataError if the optimizer's state does not fit its parameters.
    """
    if problem := misfit(optimizer, checkpoint.get('optimizer')):
        raise DataError(f'the optimizer state of the checkpoint does not fit its model: {problem}')
    groups = optimizer.state_dict()['param_groups']
    params, state = [p for group in optimizer.param_groups for p in group['params']], checkpoint['optimizer']['state']
    if hasattr(params[0], 'full_tensor'):  # of a sharded run: each rank takes its part
        from torch.distributed.tensor import distribute_tensor
        state = {i: {name: distribute_tensor(t, params[i].device_mesh, params[i].placements, src_data_rank=None)
                     if name != 'step' else t for name, t in entry.items()} for i, entry in state.items()}
    optimizer.load_state_dict({'state': state, 'param_groups': groups})
    if scaler.is_enabled() and checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
