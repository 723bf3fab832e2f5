//! Writes a trace of random requests to standard output: `generate-trace FORMAT EVENTS [VOLUMES]`, where FORMAT is alibaba, blkparse
//! or iolog; or as blktrace's files: `generate-trace blktrace EVENTS PROCESSORS NAME` writes NAME.blktrace.0 and so on.

#[path = "trace_shapes.rs"]
mod trace_shapes;

use std::fs::File;
use std::io::{BufWriter, Write, stdout};

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: generate-trace alibaba|blkparse|iolog EVENTS [VOLUMES] | blktrace EVENTS PROCESSORS NAME";
    let number = |at: usize| args.get(at).and_then(|n| n.parse::<u64>().ok());
    let events = number(1).expect(usage);
    let mut out = BufWriter::with_capacity(1 << 20, stdout().lock());
    match args[0].as_str() {
        "alibaba" => {
            trace_shapes::alibaba(events, number(2).unwrap_or(1).clamp(1, 1000), &mut out)?
        }
        "blkparse" => trace_shapes::blkparse(events, &mut out)?,
        "iolog" => trace_shapes::iolog(events, &mut out)?,
        "blktrace" => {
            let name = args.get(3).expect(usage);
            let file = |cpu| File::create_new(format!("{name}.blktrace.{cpu}"));
            let mut files = Vec::new();
            for cpu in 0..number(2).expect(usage) {
                files.push(Box::new(BufWriter::new(file(cpu)?)) as Box<dyn Write>);
            }
            trace_shapes::blktrace(events, &mut files)?;
            files.iter_mut().try_for_each(|file| file.flush())?;
        }
        _ => panic!("{usage}"),
    }
    out.flush()
}
