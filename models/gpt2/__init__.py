"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""
