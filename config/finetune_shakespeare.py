# Fine-tune the published GPT-2 XL on Shakespeare in GPT-2's tokens; a smaller one: --init_from=gpt2
#   python data/shakespeare/prepare.py && python train.py config/finetune_shakespeare.py

import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # it overfits within a few updates: keep the best

wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = f'ft-{time.time()}'

dataset = 'shakespeare'
init_from = 'gpt2-xl'

# 32 micro-steps of one sequence: 32,768 tokens an update, so these 20 updates read the text about twice
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
