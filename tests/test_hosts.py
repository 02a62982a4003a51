"""Two hosts on one machine: network namespaces, each with an address of its own."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, TINY, flags
from tests.kill_loop import free_port, latest, records, text
from tests.test_shard import distance

ADDRESSES = {'one': '10.77.0.1', 'two': '10.77.0.2'}


@pytest.fixture
def hosts():
    """start(host, arguments, output): README's command for two nodes on one of two hosts; what it prints goes there."""
    def ip(*words):
        return subprocess.run(['ip', *words], capture_output=True, text=True)

    if not shutil.which('ip') or ip('netns', 'add', 'exact-one').returncode:
        pytest.skip('needs root and Linux network namespaces')
    started = []

    def start(host: str, arguments: list[str], output: str) -> subprocess.Popen:
        rank, env = list(ADDRESSES).index(host), {**os.environ, 'GLOO_SOCKET_IFNAME': f'{host}-eth'}
        launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=1', '--nnodes=2',
                  f'--node_rank={rank}', f'--master_addr={ADDRESSES["one"]}', '--master_port=1234',
                  os.path.join(ROOT, 'train.py')]
        with open(output, 'w') as out:
            process = subprocess.Popen(['ip', 'netns', 'exec', f'exact-{host}', *launch, *arguments], env=env,
                                       stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        started.append(process)
        return process

    try:
        ip('netns', 'add', 'exact-two')
        ip(*'link add one-eth netns exact-one type veth peer name two-eth netns exact-two'.split())
        for host, address in ADDRESSES.items():
            ip('-n', f'exact-{host}', 'addr', 'add', f'{address}/24', 'dev', f'{host}-eth')
            ip('-n', f'exact-{host}', 'link', 'set', 'lo', 'up')
            assert ip('-n', f'exact-{host}', 'link', 'set', f'{host}-eth', 'up').returncode == 0
        yield start
    finally:
        end(started)
        for host in ADDRESSES:
            ip('netns', 'del', f'exact-{host}')


def link(up: bool) -> None:
    """The cable of the second host."""
    subprocess.run(['ip', '-n', 'exact-two', 'link', 'set', 'two-eth', 'up' if up else 'down'], check=True)


def end(processes: list[subprocess.Popen]) -> None:
    """Kill them, with all below them."""
    for process in processes:
        for pid in (process.pid, *children(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def children(pid: int) -> list[int]:
    """All processes below one."""
    found = subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split()
    return [p for child in map(int, found) for p in (child, *children(child))]


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize('lost', ['killed', 'cut off'])
def test_two_hosts_one_of_which_is_lost(hosts, dataset, tmp_path, script, lost):
    """The other ends, its checkpoint is whole, and the same command goes on, to the end of a run of one process."""
    options = {**TINY, 'dataset': dataset, 'max_iters': 60, 'eval_interval': 5, 'lr_decay_iters': 60}
    one, two = ([*flags(**options, init_from='auto', out_dir=tmp_path / name)] for name in ('out', 'nothing'))
    path = str(tmp_path / 'out' / 'ckpt.pt')
    first, second = hosts('one', one, str(tmp_path / '1')), hosts('two', two, str(tmp_path / '2'))
    until(lambda: os.path.exists(path))
    if lost == 'killed':
        for pid in (*children(second.pid), second.pid):
            os.kill(pid, signal.SIGKILL)
        assert first.wait(60) != 0
        assert re.search('Connection (reset|closed) by peer', text(str(tmp_path / '1')))
    else:  # without a word to anyone
        link(False)
        assert first.wait(90) != 0 and second.wait(90) != 0  # 40 s, and what a busy machine adds
        assert 'host 1 has been silent for 40 s: this one ends, too' in text(str(tmp_path / '1'))
        assert 'host 0 has been silent for 40 s: this one ends, too' in text(str(tmp_path / '2'))
        link(True)
    done = latest(tmp_path / 'out')['iter_num']
    assert 0 < done < 60 and not (tmp_path / 'nothing').exists(), 'only the first rank writes'

    if lost == 'killed':  # the second host does not see the first one's out_dir: that is said, by itself
        for host, arguments in (('one', one), ('two', two)):
            process = hosts(host, arguments, str(tmp_path / host))
        assert process.wait(60) != 0
        assert f'rank 1 started with iter_num=0, rank 0 with iter_num={done}: all of them need the same' in text(
            str(tmp_path / 'two'))

    ended = [hosts(host, one, str(tmp_path / f'{host} again')) for host in ADDRESSES]
    assert [process.wait(60) for process in ended] == [0, 0], text(str(tmp_path / 'one again'))
    script('train.py', *flags(**options, out_dir=tmp_path / 'straight'))
    assert latest(tmp_path / 'out')['iter_num'] == 60
    assert distance(latest(tmp_path / 'out'), latest(tmp_path / 'straight')) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_two_hosts_restart(dataset, tmp_path, script, killed):
    """By the command in config/README.md, two launchers on one machine: a rank is killed, both go on by themselves."""
    options = {**TINY, 'dataset': dataset, 'max_iters': 400, 'eval_interval': 20, 'lr_decay_iters': 400}
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=1', '--nnodes=2', '--rdzv_backend=c10d',
              f'--rdzv_endpoint=127.0.0.1:{free_port()}', '--max-restarts=3', os.path.join(ROOT, 'train.py')]
    env = {**os.environ, 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
    hosts = []
    try:
        for name in '01':
            with open(tmp_path / name, 'w') as out:
                hosts.append(subprocess.Popen([*launch, *flags(**options, init_from='auto', out_dir=tmp_path / 'out')],
                                              env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True))
        until(lambda: os.path.exists(tmp_path / 'out' / 'ckpt.pt'))
        os.kill(children(hosts[killed].pid)[0], signal.SIGKILL)
        assert [host.wait(120) for host in hosts] == [0, 0], text(str(tmp_path / '0')) + text(str(tmp_path / '1'))
    finally:
        end(hosts)
    assert 0 < records(tmp_path / 'out', 'run')[-1]['iter'] < 400, 'it went on, where it was saved'
    script('train.py', *flags(**options, out_dir=tmp_path / 'straight'))
    assert distance(latest(tmp_path / 'out'), latest(tmp_path / 'straight')) < 1e-5
