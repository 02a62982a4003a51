# Python's own manual, character by character: no network, no GPU, about a minute on 2 cores.
#   python data/pydoc_char/prepare.py && python train.py config/train_pydoc_char.py
# 2 cores: 24 s in bfloat16 (Xeon with AVX512-BF16), val loss 1.56; 66 s in float32 (EPYC with AVX2), 1.54.

out_dir = 'out-pydoc-char'
dataset = 'pydoc_char'
eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0
learning_rate = 4e-3
min_lr = 1e-4
beta2 = 0.99
max_iters = 1000
lr_decay_iters = 1000
warmup_iters = 50
compile = False
wandb_project = 'pydoc-char'
wandb_run_name = 'tiny'
