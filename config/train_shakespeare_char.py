# A character-level GPT on Shakespeare, small enough for one GPU and a coffee.
#   python data/shakespeare_char/prepare.py && python train.py config/train_shakespeare_char.py
# One H200, bfloat16: 40 to 44 s, the first time 45 to 48: it compiles. Best val loss 1.46; after step 2000 it overfits.

out_dir = 'out-shakespeare-char'
eval_interval = 250  # small data overfits: look often
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # keep the best on the validation text

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # a small model bears more
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens a step: average over more steps
warmup_iters = 100
