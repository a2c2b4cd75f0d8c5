import time, resource, pytest
from protos import generation_pb2 as pb
def test_x(doors, capsys):
    r = pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[200]), sampling_params=pb.SamplingParams(max_tokens=500, seed=1), speculation=pb.Speculation(enabled=False))
    import psutil
    names = ("ServeReplica:paceline:Target","ServeReplica:paceline:Ingress","ProxyActor")
    def cpu():
        out={}
        for p in psutil.process_iter(["cmdline","cpu_times"]):
            c=" ".join(p.info["cmdline"] or [])
            for n in names:
                if n in c: out[n]=out.get(n,0)+p.info["cpu_times"].user+p.info["cpu_times"].system
        return out
    with capsys.disabled():
        for i in range(4):
            a=cpu(); t=time.time()
            n=len(list(doors.stub.GenerateStream(r)))
            dt=time.time()-t; b=cpu()
            print(n, f"{dt:.2f}s", {k.split(':')[-1]: round(b[k]-a[k],2) for k in b})
