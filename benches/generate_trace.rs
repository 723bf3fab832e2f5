//! Writes a trace to standard output: `generate-trace SHAPE FORMAT EVENTS [VOLUMES]`, where SHAPE is random, uniform, locality,
//! provisioning or filling, and FORMAT is alibaba, blkparse or iolog; or as blktrace's files: `generate-trace SHAPE blktrace EVENTS PROCESSORS NAME`
//! writes NAME.blktrace.0 and so on, with a record for each request and one for its completion, and `blktrace-queue` those of requests
//! alone.

#[path = "trace_shapes.rs"]
mod trace_shapes;

use std::fs::File;
use std::io::{BufWriter, Write, stdout};

use trace_shapes::{Records, Shape};

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: generate-trace random|uniform|locality|provisioning|filling alibaba|blkparse|iolog EVENTS [VOLUMES] \
                 | SHAPE blktrace|blktrace-queue EVENTS PROCESSORS NAME";
    let number = |at: usize| args.get(at).and_then(|n| n.parse::<u64>().ok());
    let shape = args
        .first()
        .and_then(|name| Shape::named(name))
        .expect(usage);
    let events = number(2).expect(usage);
    let mut out = BufWriter::with_capacity(1 << 20, stdout().lock());
    match args[1].as_str() {
        "alibaba" => {
            let volumes = number(3).unwrap_or(1).clamp(1, 1000);
            trace_shapes::alibaba(shape, events, volumes, &mut out)?;
        }
        "blkparse" => trace_shapes::blkparse(shape, events, &mut out)?,
        "iolog" => trace_shapes::iolog(shape, events, &mut out)?,
        "blktrace" | "blktrace-queue" => {
            let which = match args[1].as_str() {
                "blktrace" => Records::All,
                _ => Records::Queued,
            };
            let name = args.get(4).expect(usage);
            let file = |cpu| File::create_new(format!("{name}.blktrace.{cpu}"));
            let mut files = Vec::new();
            for cpu in 0..number(3).expect(usage) {
                files.push(Box::new(BufWriter::new(file(cpu)?)) as Box<dyn Write>);
            }
            trace_shapes::blktrace(shape, events, which, &mut files)?;
            files.iter_mut().try_for_each(|file| file.flush())?;
        }
        _ => panic!("{usage}"),
    }
    out.flush()
}
