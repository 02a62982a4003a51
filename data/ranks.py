"""The processes of a run: how they find each other under torchrun, start alike, average, and are told to stop."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from data import DataError, nobody_reads

SILENCE = 40  # seconds after which a host of several counts as lost


def launched() -> tuple[bool, int, int, int]:
    """
    Whether torchrun started this process; its rank, its rank on this machine, and the number of processes: False, 0, 0,
    1 without it. RANK decides; a WORLD_SIZE alone, as schedulers set it, means nothing. DataError if RANK is there and
    the rest is not, or is no number.
    """
    if not os.environ.get('RANK'):
        return False, 0, 0, 1
    missing = [name for name in ('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if missing:
        raise DataError(f'RANK={os.environ["RANK"]} is set, but not {", ".join(missing)}: start several processes with '
                        'torchrun, which sets them all, or unset RANK for one', one_rank=True)
    try:
        rank, local_rank, processes = (int(os.environ[name]) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))
        if 0 <= rank < processes and local_rank >= 0:
            return True, rank, local_rank, processes
    except ValueError:
        pass
    raise DataError('RANK={RANK}, LOCAL_RANK={LOCAL_RANK}, WORLD_SIZE={WORLD_SIZE} do not fit together: start several '
                    'processes with torchrun'.format_map(os.environ), one_rank=True)


def join_ranks(several: bool, device: str, backend: str, local_rank: int) -> tuple[str, str]:
    """Make the process group, if there are several ranks; returns this one's device, which is made the current one, and
    the backend that is chosen. All restarts by one torchrun share a store, in which ranks would find the addresses of
    before (pytorch issue 167288); so on one machine each restart uses a part of it. Several machines count restarts
    each for itself; see config/README.md for them."""
    import torch
    import torch.distributed as dist
    if not several:
        if device.startswith('cuda:'):
            torch.cuda.set_device(device)
        return device, backend
    backend = backend if backend != 'auto' else 'nccl' if device.startswith('cuda') else 'gloo'
    if backend == 'nccl' and not device.startswith('cuda'):
        raise DataError(f'backend=nccl is for GPUs, and device={device} is none: choose gloo')
    store, rank, processes = next(dist.rendezvous('env://'))
    hosts = int(os.environ.get('GROUP_WORLD_SIZE', 0))  # 0: not started by torchrun
    store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store) if hosts == 1 else store
    if device.startswith('cuda'):
        device = f'cuda:{local_rank}'
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes,
                            device_id=torch.device(device) if backend == 'nccl' else None)
    if hosts > 1 and local_rank == 0:
        _watch_hosts(store.clone(), int(os.environ['GROUP_RANK']), hosts)
    return device, backend


def _watch_hosts(store, this: int, count: int) -> None:
    """From now on, end this process if another host is silent for SILENCE seconds, its network or power gone: a
    collective would wait for its timeout, many minutes. torchrun then ends or restarts the others."""
    silent = dict.fromkeys(range(count), 0)  # seconds, counted here: a process that is stopped does not count

    def exchange():
        heard = {}
        with contextlib.suppress(RuntimeError):  # the store's own host is gone: nobody is heard any more
            while True:
                store.set(f'host {this}', str(time.time()))
                for host in range(count):
                    if store.check([f'host {host}']) and (said := store.get(f'host {host}')) != heard.get(host):
                        heard[host], silent[host] = said, 0
                time.sleep(SILENCE / 20)

    def wait():
        while max(silent.values()) < SILENCE:
            time.sleep(1)
            for host in silent:
                silent[host] += 1
        host = max(silent, key=silent.get)
        print(f'host {host} has been silent for {SILENCE} s: this one ends, too', file=sys.__stderr__, flush=True)
        os._exit(1)

    for work in (exchange, wait):
        threading.Thread(target=work, daemon=True).start()


def agreed(what: dict, digests: dict, model) -> None:
    """All ranks must start alike: DataError on each of them that names what differs first: a file of the dataset, an
    entry of `what` other than out_dir, device, dataset and wandb_*, or the weights' sum of norms."""
    import torch
    import torch.distributed as dist
    size = sum(torch.linalg.vector_norm(p.detach(), dtype=torch.float64).item() for p in model.parameters())
    what = {**{f'{split}.bin': digest for split, digest in digests.items()}, **what, 'weights': f'{size:.6g}'}
    everyone = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(everyone, what)
    except RuntimeError as e:
        raise DataError('another rank ended at the start; it says why', one_rank=True) from e
    for rank, theirs in enumerate(everyone):
        for key, first in everyone[0].items():
            if theirs[key] != first and key not in ('out_dir', 'device', 'dataset') and not key.startswith('wandb_'):
                theirs, first = (f'{value!s:.60}' for value in (theirs[key], first))
                raise DataError(f'rank {rank} started with {key}={theirs}, rank 0 with {key}={first}: all of them '
                                'need the same options, data and checkpoint')


def mean_over_ranks(*values) -> Callable[[], list[float]]:
    """Average tensors of one number over all processes. Returns a function that waits for the means, and gives them as
    floats: called later, it does not wait for what a GPU was told to do in between."""
    import torch
    import torch.distributed as dist
    mean = torch.stack(values)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean.div_(dist.get_world_size()))
    if not mean.is_cuda:
        return mean.tolist
    mean, there = mean.to('cpu', non_blocking=True), torch.cuda.current_stream(mean.device).record_event()
    return lambda: there.synchronize() or mean.tolist()


class Stop:
    """
    Whether the process has been asked for an orderly end, as its truth value: by SIGTERM, SIGINT, SIGUSR1 (Slurm warns
    so) or SIGHUP (its terminal is gone), or because nobody reads what say() prints. A second signal ends it at once.
    Signals count between listen() and forget(), which puts back what was there; those that are ignored stay so.
    """

    def __init__(self, speaks: bool):
        self.speaks, self.asked, self.before = speaks, False, {}

    def __bool__(self) -> bool:
        return self.asked

    def say(self, *words) -> None:
        """print(), in one process of all."""
        try:
            if self.speaks:
                print(*words)
        except OSError:  # its reader has ended, as `head` does, or its terminal was closed
            nobody_reads()
            self.asked = True

    def listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only there Python takes signals; a run goes on without them
        for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'):
            number = getattr(signal, name, None)  # Windows lacks two of them
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame) -> None:
        self.asked = True
        with contextlib.suppress(OSError):
            if self.speaks:  # print() is not safe in here
                os.write(2, b'finishing this update; a second signal quits at once\n')
        for other in self.before:
            signal.signal(other, signal.SIG_DFL)

    def forget(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
