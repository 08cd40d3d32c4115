class DPOConfig: pass
