"""What only a CUDA device can show: no step waits for it, captured steps are the steps, bf16 is as near as autocast."""

import pytest
import torch
import torch.nn.functional as F

from model import GPT, MLP, FusedCrossEntropy, GPTConfig, KVCache, captured, lm_loss, triton_works
from tests.conftest import TINY, flags

cuda = pytest.mark.gpu
GPU = {**TINY, 'device': 'cuda', 'dtype': 'bfloat16'}


@cuda
@pytest.mark.parametrize('knobs', [dict(), dict(n_embd=768, n_head=12, batch_size=40, block_size=1024, n_layer=12)],
                         ids=['captured', 'launched'])
def test_a_step_that_does_not_log_never_waits(script, dataset, tmp_path, knobs):
    def on_step(step, model):
        torch.cuda.set_sync_debug_mode('error' if 3 <= step < 7 else 'default')

    try:
        names = script('train.py', *flags(**{**GPU, 'dataset': dataset, 'out_dir': tmp_path, 'log_interval': 100,
                                             'eval_interval': 100, 'dropout': 0.1, **knobs}), on_step=on_step)
        assert names['capture'] == (not knobs)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@cuda
def test_batches_arrive_whole_though_the_device_is_behind(script, dataset, tmp_path):
    """The pinned copy of a batch is free again when to_device returns; it must not be refilled before it is read."""
    names = script('train.py', *flags(**{**GPU, 'dataset': dataset, 'out_dir': tmp_path, 'max_iters': 1}))
    torch.cuda._sleep(1 << 31)  # a second
    arrived = [names['to_device'](torch.full((12, 1024), i)) for i in range(64)]
    assert not torch.cuda.current_stream().query()  # not one of them has been read yet
    assert all((ids == i).all() for i, ids in enumerate(arrived))


@cuda
def test_captured_steps_are_the_steps():
    """Same losses, gradient norms and parameters, with accumulation and dropout, as when every kernel is launched."""
    device, runs = torch.device('cuda'), []
    for capture in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=3, n_head=4, n_embd=64, dropout=0.1)).to(device)
        optimizer = model.configure_optimizers(0.1, torch.tensor(1e-3, device=device), (0.9, 0.99), 'cuda')
        for group in optimizer.param_groups:
            group['capturable'] = True

        def forward_backward(x, y, model=model):
            with torch.autocast('cuda', torch.bfloat16):
                loss = model(x, y, keep_logits=False)[1]
            loss.backward()
            return loss.detach()

        def clip_and_step(model=model, optimizer=optimizer):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            return norm

        if capture:
            forward_backward, clip_and_step = captured(forward_backward, device), captured(clip_and_step, device)
        g, seen = torch.Generator().manual_seed(5), []
        for step in range(20):
            for micro in range(2):
                ids = torch.randint(65, (8, 65), generator=g).to(device)
                torch.manual_seed(10 * step + micro)
                seen.append(forward_backward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).item())
            seen.append(clip_and_step().item())
        runs.append((seen, [p.detach().clone() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


@cuda
@pytest.mark.parametrize('bias', [True, False])
def test_gradients_are_as_near_to_float32_as_autocast(bias):
    torch.manual_seed(0)
    config = GPTConfig(block_size=256, vocab_size=1024, n_layer=6, n_head=6, n_embd=384, bias=bias)
    model = GPT(config).cuda()
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    fast = torch.compile(model, dynamic=False)
    ids = torch.randint(1024, (8, 257), device='cuda')
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def gradient(forward, dtype):
        with torch.autocast('cuda', torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = forward(x, y, keep_logits=False)[1]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    def plain(x, y, keep_logits):
        """The residual stream in float32, as autocast alone leaves it."""
        h = model.transformer.wte(x) + model.transformer.wpe.weight[:x.size(1)]
        for block in model.transformer.h:
            h = block(h)
        logits = model.lm_head(model.transformer.ln_f(h))
        return None, F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    torch.set_float32_matmul_precision('highest')
    exact, autocast = gradient(plain, torch.float32), gradient(plain, torch.bfloat16)
    error = (gradient(fast, torch.bfloat16) - exact).norm() / exact.norm()
    limit = 1.25 * (autocast - exact).norm() / exact.norm()
    print(f'relative error of the gradient: ours {error:.3e}, plain autocast {limit / 1.25:.3e}')
    assert error <= limit
    assert (gradient(fast, torch.float32) - exact).norm() <= 1e-5 * exact.norm()

    # and where the compiled backward pass adds to gradients by itself, which it then never rounds to 16 bits
    model.copy_weights(torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        with torch.autocast('cuda', torch.bfloat16):
            loss = fast(x, y, keep_logits=False)[1]
        loss.backward()
    for name, p in model.named_parameters():
        assert p.dim() == 1 or name.endswith('wpe.weight') or (p.grad != p.grad.bfloat16()).any(), name
    model.unfold_gradients()
    added = torch.cat([p.grad.flatten() for p in model.parameters()])
    print(f'added up twice {(added / 2 - exact).norm() / exact.norm():.3e}')
    assert (added / 2 - exact).norm() <= limit * exact.norm()


@cuda
def test_compiled_gelu_is_the_fast_one():
    """Which is exact also where 1 + erf has lost its digits."""
    mlp = MLP(GPTConfig(n_embd=4, n_head=1, bias=False))
    with torch.no_grad():
        for layer in (mlp.c_fc, mlp.c_proj):
            layer.weight.zero_()[0, 0] = 1
    x = torch.zeros(1, 1000, 4, dtype=torch.bfloat16, device='cuda')
    x[0, :, 0] = torch.linspace(-6, 6, 1000)
    exact, mlp = F.gelu(x.double()), mlp.cuda().bfloat16()
    torch.testing.assert_close(torch.compile(mlp, dynamic=False)(x).double(), exact, rtol=2 ** -8, atol=0)
    assert ((mlp(x) - exact).abs() > 2 ** -8 * exact.abs()).any()


@cuda
def test_triton_works():
    """Or every other test here would compare torch's own kernels with themselves."""
    assert triton_works(torch.device('cuda'))


@cuda
@pytest.mark.parametrize('V', [50, 16385, 17000])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('adds', [False, True])
def test_fused_cross_entropy_is_cross_entropy(V, dtype, adds):
    if adds and dtype == torch.float32:
        pytest.skip('gradients are added to only in 16 bits')
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('highest')
    x, weight = (torch.randn(n, 16, device='cuda').to(dtype).requires_grad_() for n in (40, V))
    targets = torch.randint(V, (40,), device='cuda')
    targets[3] = -1
    plain = F.cross_entropy(x.double() @ weight.double().t(), targets, ignore_index=-1)
    total = torch.ones(V, 16, device='cuda') if adds else None
    fused = FusedCrossEntropy.apply(x, weight, targets, total)
    near = {'rtol': 1e-5, 'atol': 1e-6} if dtype == torch.float32 else {'rtol': 3e-2, 'atol': 3e-3}
    torch.testing.assert_close(fused.double(), plain, **near)
    ours = torch.autograd.grad(3 * fused, (x, weight), allow_unused=adds)
    theirs = torch.autograd.grad(3 * plain, (x, weight))
    torch.testing.assert_close(ours[0], theirs[0], **near)
    torch.testing.assert_close((total - 1).to(dtype) if adds else ours[1], theirs[1], **near)


@cuda
def test_compiled_loss_of_a_vocabulary_that_is_no_multiple():
    """50,257: inductor may pad the rows of the logits."""
    torch.manual_seed(0)
    x, weight = torch.randn(256, 64, device='cuda'), torch.randn(50257, 64, device='cuda') / 8
    x, weight = (t.bfloat16().requires_grad_() for t in (x, weight))
    targets = torch.randint(-1, 50257, (256,), device='cuda')
    plain = F.cross_entropy(x.double() @ weight.double().t(), targets, ignore_index=-1)
    loss = torch.compile(lambda *args: lm_loss(*args), dynamic=False)(x, weight, targets)
    torch.testing.assert_close(loss.double(), plain, rtol=1e-2, atol=1e-2)
    for ours, theirs in zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(plain, (x, weight))):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


@cuda
@pytest.mark.parametrize('batch', [1, 2, 3])
@torch.inference_mode()
def test_bfloat16_kernels_are_as_near_to_float32_as_torch(batch):
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('highest')
    config = GPTConfig(block_size=128, vocab_size=1000, n_layer=4, n_head=4, n_embd=256, gelu='exact')
    model, idx = GPT(config).cuda().eval(), torch.randint(1000, (batch, 128), device='cuda')
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.bfloat16()
    cache = KVCache(config, batch, 128, idx.device, torch.bfloat16)
    model(idx[:, :127], cache=cache)
    ours, torchs = model.forward_token(idx[:, 127:], cache).float(), model(idx)[0].float()
    exact = model.float()(idx)[0]
    assert (ours - exact).norm() <= 1.25 * (torchs - exact).norm()


@cuda
@pytest.mark.parametrize('gelu', ['exact', 'tanh'])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('batch', [1, 2, 3])
@torch.inference_mode()
def test_a_token_by_the_kernels(batch, bias, gelu):
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('highest')
    config = GPTConfig(block_size=300, vocab_size=50_000, n_layer=3, n_head=3, n_embd=72, bias=bias, gelu=gelu)
    model, idx = GPT(config).cuda().eval(), torch.randint(1000, (batch, 300), device='cuda')
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    cache = KVCache(config, batch, 300, idx.device, torch.float32)
    model(idx[:, :297], cache=cache)
    for t in range(297, 300):
        logits = model.forward_token(idx[:, t:t + 1], cache)
    torch.testing.assert_close(logits, model(idx)[0], rtol=1e-4, atol=1e-4)
