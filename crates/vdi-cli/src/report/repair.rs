//! A repair's plan for people. What is applied is this plan, step by step, in this order.

use std::io::{self, Write};

use vdi_core::check::LISTED_PER_KIND;
use vdi_core::repair::{BlockPlan, Change, FieldChange, FieldValue, Left, Plan, Target, Why};

/// Writes what is to be done, and what cannot be done.
pub(crate) fn repair(out: &mut impl Write, plan: &Plan) -> io::Result<()> {
    for field in &plan.fields {
        write_field(out, field)?;
    }
    if let Some(blocks) = &plan.blocks {
        write_blocks(out, blocks)?;
    }
    for Left { finding, why } in &plan.left {
        writeln!(out, "not mended: {finding}\n  {why}")?;
    }
    if plan.left_unnamed > 0 {
        writeln!(out, "not mended: {} more blocks", plan.left_unnamed)?;
    }
    Ok(())
}

fn write_field(out: &mut impl Write, change: &FieldChange) -> io::Result<()> {
    let FieldChange { field, to, .. } = change;
    match to {
        FieldValue::Number { from, to } => writeln!(out, "{field}: {from} becomes {to}"),
        FieldValue::Uuid(_) => writeln!(
            out,
            "{field}: null becomes a new random one; children and VirtualBox's registry know the old one"
        ),
    }
}

fn write_blocks(out: &mut impl Write, blocks: &BlockPlan) -> io::Result<()> {
    if let Some((block, missing)) = blocks.cut_short {
        writeln!(
            out,
            "disk block {block}: the file ends inside it; its last {missing} bytes are lost and read as zeros"
        )?;
    }
    if let Some((from, to)) = blocks.lengthen {
        writeln!(out, "file: lengthened from {from} to {to} bytes")?;
    }
    if let Some((from, to)) = blocks.raise_count {
        writeln!(out, "blocks_allocated: {from} becomes {to}")?;
    }
    for why in [Why::Unreadable, Why::Shared, Why::OutOfRange, Why::Hole] {
        write_changes(out, blocks, why)?;
    }
    if blocks.copied_bytes() > 0 {
        writeln!(out, "{} bytes are copied", blocks.copied_bytes())?;
    }
    if let Some((from, to)) = blocks.set_count {
        writeln!(out, "blocks_allocated: {from} becomes {to}")?;
    }
    if let Some((from, to)) = blocks.cut_to {
        writeln!(out, "file: cut from {from} to {to} bytes")?;
    }
    Ok(())
}

fn write_changes(out: &mut impl Write, blocks: &BlockPlan, why: Why) -> io::Result<()> {
    let mut changes = blocks.changes.iter().filter(|change| change.why == why);
    let reason = match why {
        Why::Shared => "which another disk block has too",
        Why::OutOfRange => "which is not below blocks_in_image",
        Why::Hole => "which lies behind a hole",
        Why::Unreadable => "which is not in the file",
    };
    for Change {
        block, from, to, ..
    } in changes.by_ref().take(LISTED_PER_KIND)
    {
        match to {
            Target::Copy(to) => writeln!(
                out,
                "disk block {block}: moves from file block {from}, {reason}, to {to}"
            )?,
            Target::Zero => writeln!(
                out,
                "disk block {block}: in file block {from}, {reason}; lost, becomes zeros"
            )?,
        }
    }
    match changes.count() {
        0 => Ok(()),
        more => writeln!(out, "{more} more like these"),
    }
}
