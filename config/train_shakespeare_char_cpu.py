# The same text with a model for a laptop without a GPU.
#   python data/shakespeare_char/prepare.py && python train.py config/train_shakespeare_char_cpu.py
# 2 cores: 40 s in bfloat16 (Xeon with AVX512-BF16), 2 minutes in float32 (EPYC with AVX2);
# val loss 1.90 with --eval_iters=200 in both (three seeds).

out_dir = 'out-shakespeare-char-cpu'
eval_interval = 250
eval_iters = 20  # a rough estimate; --eval_iters=200 for one to compare
log_interval = 1
always_save_checkpoint = False

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

device = 'cpu'
compile = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'tiny-cpu'
