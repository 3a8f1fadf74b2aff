import json, shutil, torch, pytest, os, time
from pathlib import Path
from deepalign.models import load_model, fingerprint
from deepalign.errors import UserError
def L(n,**k):
    try:
        m=load_model(str(n),**{"dtype":"float32","device":"cpu",**k}); print("OK",m.source,m.fingerprint,m.dtype, m.architecture,len(m.tokenizer))
        return m
    except UserError as e: print("UE",e)
    except BaseException as e: print("RAW",type(e).__name__,str(e)[:300])
def test_x(tiny_tokenizer, tiny_model_folder, tiny_llama, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model, PromptTuningConfig
    base=tiny_model_folder("base"); L(base)
    print("no tokenizer"); f=tmp_path/"notok"; tiny_llama().save_pretrained(f); L(f)
    print("only bin"); f=tmp_path/"bin"; shutil.copytree(base,f); (f/"model.safetensors").unlink(); torch.save({}, f/"pytorch_model.bin"); L(f)
    print("empty"); f=tmp_path/"empty"; f.mkdir(); L(f)
    print("corrupt"); f=tmp_path/"cor"; shutil.copytree(base,f); (f/"model.safetensors").write_bytes(b"hello"); L(f)
    print("missing weights"); f=tmp_path/"mis"; shutil.copytree(base,f)
    from safetensors.torch import load_file, save_file
    w=load_file(f/"model.safetensors"); w.pop("model.layers.1.mlp.up_proj.weight"); save_file(w,f/"model.safetensors",metadata={"format":"pt"}); L(f)
    print("badconfig"); f=tmp_path/"bc"; shutil.copytree(base,f); (f/"config.json").write_text("{"); L(f)
    print("t5"); f=tmp_path/"t5"; shutil.copytree(base,f); (f/"config.json").write_text('{"model_type":"t5"}'); L(f)
    print("automap"); f=tmp_path/"am"; shutil.copytree(base,f); (f/"config.json").write_text('{"model_type":"weird","auto_map":{"AutoConfig":"conf.X","AutoModelForCausalLM":"conf.Y"}}'); (f/"conf.py").write_text("raise SystemError('pwned')"); 
    t=time.time(); L(f); print(time.time()-t)
    print("truncated shape"); f=tmp_path/"sh"; shutil.copytree(base,f); w=load_file(f/"model.safetensors"); w["model.norm.weight"]=torch.ones(7); save_file(w,f/"model.safetensors",metadata={"format":"pt"}); L(f)
    print("adapter")
    m=get_peft_model(tiny_llama(),LoraConfig(r=2,target_modules=["q_proj","v_proj"],init_lora_weights=False)); m.peft_config["default"].base_model_name_or_path=str(base)
    a=tmp_path/"ad"; m.save_pretrained(a); L(a)
    for k,ch in {"missing base":{"base_model_name_or_path":str(tmp_path/"gone")},"none":{"base_model_name_or_path":None},"hub":{"base_model_name_or_path":"nobody/none"},"unk type":{"peft_type":"WEIRD"},"rank":{"r":4},"nomods":{"target_modules":["zzz"]}}.items():
        f=tmp_path/("a_"+k); shutil.copytree(a,f); c=json.loads((f/"adapter_config.json").read_text()); c.update(ch); (f/"adapter_config.json").write_text(json.dumps(c)); print(k); monkeypatch.setenv("HF_HUB_OFFLINE","1"); t=time.time(); L(f); print(time.time()-t)
    print("corrupt ad"); f=tmp_path/"a_c"; shutil.copytree(a,f); (f/"adapter_model.safetensors").write_bytes(b"xx"); L(f)
    print("wrong base"); o=tiny_model_folder("other",hidden_size=16); L(a,adapter_base=str(o))
    print("self"); f=tmp_path/"a_self"; shutil.copytree(a,f); c=json.loads((f/"adapter_config.json").read_text()); c["base_model_name_or_path"]=str(f); (f/"adapter_config.json").write_text(json.dumps(c)); L(f)
    print("prompt tuning"); m=get_peft_model(tiny_llama(),PromptTuningConfig(task_type="CAUSAL_LM",num_virtual_tokens=3)); m.peft_config["default"].base_model_name_or_path=str(base); m.save_pretrained(tmp_path/"pt"); L(tmp_path/"pt")
    print("paths"); L(tmp_path/"nope"); L("./nope"); L("a b"); L(str(base/"config.json")); L("testbed:nope"); L("nobody/nothing"); L("nobody/nothing",revision="x"); L("gpt2")
    L(base,device="cuda:7"); L(base,device="bogus"); L(base,dtype="int4"); L(base,device="meta"); L(base, chat_template=str(tmp_path/"no.jinja"))
    L("")
    (tmp_path/"x.gguf").write_bytes(b"GGUFxxxx"); L(tmp_path/"x.gguf")
    (tmp_path/"weights.safetensors").write_bytes(b"GGUFxxxx"); L(tmp_path/"weights.safetensors")
    assert 0
