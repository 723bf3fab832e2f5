//! `thin_restore` reads every dump that there is, and refuses whatever is no description of a pool before it touches the output.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use crate::support::{
    Call, Finished, Image, Pool, check, damage_lines, dump, expand, expand_text, restore, thintools,
};

/// Bytes that the reader of XML takes at a time.
const CHUNK: usize = 512 * 1024;

const POOL: &str = r#"<superblock uuid="" time="5" transaction="3" version="2" data_block_size="128" nr_data_blocks="1000">"#;
const DEVICE: &str =
    r#"<device dev_id="0" mapped_blocks="1" transaction="0" creation_time="0" snap_time="0">"#;
const ONE: &str = r#"<single_mapping origin_block="0" data_block="0" time="0"/>"#;

/// A whole dump with these lines inside of a device; the first of them is line 3.
fn in_device(lines: &str) -> String {
    format!("{POOL}\n{DEVICE}\n{lines}\n</device>\n</superblock>\n")
}

/// A whole dump with these lines inside of the pool; the first of them is line 2.
fn in_pool(lines: &str) -> String {
    format!("{POOL}\n{lines}\n</superblock>\n")
}

/// A whole dump with one mapping.
fn plain() -> String {
    in_device(ONE)
}

/// Restores to a device that holds a pool already.
fn try_restore(xml: &[u8]) -> (Finished, bool) {
    let image = Image::of("snap-mix-a/meta");
    let before = image.bytes();
    let input = image.beside("input.xml");
    fs::write(&input, xml).expect("written");
    let done = restore(&input, image.path());
    let is_unchanged = image.bytes() == before;
    (done, is_unchanged)
}

/// Not restored, with a message that has all of these texts, and the output is what it was.
#[track_caller]
fn refused(xml: impl AsRef<[u8]>, texts: &[&str]) -> Finished {
    let (done, is_unchanged) = try_restore(xml.as_ref());
    assert!(is_unchanged, "the output was changed: {}", done.stderr);
    let done = done.expect(5).expect_stderr(texts);
    assert_eq!(done.stdout, b"");
    for odd in ["panicked", "IllFormed", "Err("] {
        assert!(
            !done.stderr.contains(odd),
            "no words for people: {}",
            done.stderr
        );
    }
    done
}

/// Restored without a word to sound metadata; what it holds comes back.
#[track_caller]
fn accepted(xml: impl AsRef<[u8]>) -> Pool {
    let image = Image::empty(256);
    let input = image.beside("input.xml");
    fs::write(&input, xml).expect("written");
    let done = restore(&input, image.path()).expect(0);
    assert_eq!(done.stderr, "");
    sound(&image);
    image.dumped()
}

#[track_caller]
fn sound(image: &Image) {
    let checked = check(&[], image.path()).expect(0);
    let worse = damage_lines(&checked.stderr)
        .into_iter()
        .filter(|d| d.0 != "note")
        .count();
    assert_eq!(worse, 0, "{}", checked.stderr);
}

/// Named tests of XML that is refused with these words.
macro_rules! refused {
    ($($(#[$attribute:meta])* $name:ident: $xml:expr, [$($text:expr),* $(,)?];)*) => {
        $($(#[$attribute])* #[test] fn $name() { refused($xml, &[$($text),*]); })*
    };
}

/// Named tests of XML that means the same as [`plain`].
macro_rules! same_as_plain {
    ($($name:ident: $xml:expr;)*) => {
        $(#[test] fn $name() { assert_eq!(accepted($xml), Pool::read(&plain())); })*
    };
}

refused! {
    an_empty_input_is_refused: "", ["no <superblock>"];
    white_space_alone_is_refused: "\n\n   \n", ["line 4", "no <superblock>"];
    a_declaration_alone_is_refused: "<?xml version=\"1.0\"?>\n", ["no <superblock>"];
    a_comment_alone_is_refused: "<!-- nothing -->\n", ["no <superblock>"];
    text_in_place_of_xml_is_refused: "hello\n", ["line 1"];
    text_between_tags_is_refused: in_device("hello"), ["line 3", "hello"];
    text_after_a_mapping_is_refused: in_device(&format!("{ONE} hello\n{ONE}")), ["line 3", "hello"];
    text_behind_the_end_is_refused: plain() + "hello\n", ["line 6", "hello"];
    nul_bytes_are_refused: in_device("\0\0\0\0"), ["line 3"];
    nul_bytes_behind_the_end_are_refused: plain() + "\0\0\0\0", ["line 6"];
    bytes_that_are_no_text_are_refused: [in_device("<!-- -->").as_bytes(), b"\xff\xfe\n"].concat(), ["line 6"];
    bytes_that_are_no_text_in_a_name_are_refused:
        in_pool("<def name=\"??\">\n</def>").replace("??", "\u{1}\u{2}").into_bytes().iter()
            .map(|&b| if b == 1 || b == 2 { 0xff } else { b }).collect::<Vec<u8>>(), ["line 2"];
    metadata_in_place_of_xml_is_refused: expand("snap-mix-a/meta.img"), ["binary metadata", "thin_dump"];
    a_compressed_dump_is_refused:
        fs::read(crate::support::testdata().join("snap-mix-a/meta.dump-0.9.xml.zst")).expect("read"), ["compressed"];
    a_doctype_is_refused: format!("<!DOCTYPE superblock>\n{}", plain()), ["line 1"];
    cdata_is_refused: in_device("<![CDATA[ x ]]>"), ["line 3"];
    a_comment_without_an_end_is_refused: in_device("<!-- and so on"), ["does not end"];
    a_declaration_without_an_end_is_refused: format!("<?xml version=\"1.0\"\n{}", plain()), ["line", "does not end"];
    a_tag_without_an_end_is_refused: format!("{POOL}\n{DEVICE}\n<single_mapping origin_block=\"0\""), ["line 3"];
    a_value_without_an_end_is_refused: in_device("<single_mapping origin_block=\"0 data_block=\"0\" time=\"0\"/>"), ["line 3"];

    an_unknown_tag_is_refused: in_device("<mapping a=\"0\"/>"), ["line 3", "mapping"];
    a_tag_in_capitals_is_refused: in_device("<SINGLE_MAPPING origin_block=\"0\" data_block=\"0\" time=\"0\"/>"), ["line 3", "SINGLE_MAPPING"];
    an_unknown_attribute_of_a_mapping_is_refused:
        in_device("<single_mapping origin_block=\"0\" data_block=\"0\" time=\"0\" colour=\"1\"/>"), ["line 3", "colour"];
    an_unknown_attribute_of_a_device_is_refused: plain().replace(" snap_time", " colour=\"1\" snap_time"), ["line 2", "colour"];
    an_unknown_attribute_of_the_superblock_is_refused: plain().replace(" version", " colour=\"1\" version"), ["line 1", "colour"];
    an_unknown_attribute_of_a_definition_is_refused: in_pool("<def name=\"a\" colour=\"1\">\n</def>"), ["line 2", "colour"];
    a_length_of_a_single_mapping_is_refused:
        in_device("<single_mapping origin_block=\"0\" data_block=\"0\" length=\"1\" time=\"0\"/>"), ["line 3", "length"];

    /// 1.3.3 panics.
    a_duplicate_attribute_is_refused:
        in_device("<single_mapping origin_block=\"0\" origin_block=\"1\" data_block=\"0\" time=\"0\"/>"), ["line 3"];
    a_duplicate_attribute_of_the_superblock_is_refused: plain().replace(" version", " time=\"6\" version"), ["line 1"];
    /// 1.3.3 panics.
    an_unquoted_value_is_refused: in_device("<single_mapping origin_block=0 data_block=\"0\" time=\"0\"/>"), ["line 3"];
    an_attribute_without_a_value_is_refused: in_device("<single_mapping origin_block data_block=\"0\" time=\"0\"/>"), ["line 3"];
    /// 1.3.3 panics.
    a_reference_without_a_name_is_refused: in_device("<ref/>"), ["line 3", "attribute name"];
    a_definition_without_a_name_is_refused: in_pool("<def>\n</def>"), ["line 2", "attribute name"];
    a_range_without_a_length_is_refused:
        in_device("<range_mapping origin_begin=\"0\" data_begin=\"0\" time=\"0\"/>"), ["line 3", "attribute length"];
    a_mapping_without_a_time_is_refused:
        in_device("<single_mapping origin_block=\"0\" data_block=\"0\"/>"), ["line 3", "attribute time"];
    a_mapping_without_a_virtual_block_is_refused:
        in_device("<single_mapping data_block=\"0\" time=\"0\"/>"), ["line 3", "attribute origin_block"];
    a_mapping_without_a_data_block_is_refused:
        in_device("<range_mapping origin_begin=\"0\" length=\"1\" time=\"0\"/>"), ["line 3", "attribute data_begin"];

    /// 1.3.3 prints the Debug form of its parser's error.
    mismatched_tags_are_refused: plain().replace("</device>", "</def>"), ["line 4", "def"];
    a_superblock_that_ends_in_a_device_is_refused: format!("{POOL}\n{DEVICE}\n{ONE}\n</superblock>\n"), ["line 4", "superblock"];
    a_device_that_does_not_end_is_refused: format!("{POOL}\n{DEVICE}\n{ONE}\n"), ["incomplete"];
    a_superblock_that_does_not_end_is_refused: format!("{POOL}\n{DEVICE}\n{ONE}\n</device>\n"), ["incomplete"];
    an_end_too_many_is_refused: plain().replace("</device>", "</device>\n</device>"), ["line 5", "device"];
    an_end_of_a_mapping_that_is_not_open_is_refused: in_device("</single_mapping>"), ["line 3", "single_mapping"];
    a_mapping_that_does_not_end_is_refused: in_device(&ONE.replace("/>", ">")), ["line"];
    a_mapping_inside_of_a_mapping_is_refused:
        in_device(&format!("{}{ONE}</single_mapping>", ONE.replace("/>", ">"))), ["line 3", "single_mapping"];
    a_mapping_inside_of_a_reference_is_refused:
        in_pool(&format!("<def name=\"a\">{ONE}</def>\n{DEVICE}\n<ref name=\"a\">{ONE}</ref>\n</device>")), ["line 4", "ref"];
    a_device_in_a_device_is_refused: in_device(&format!("{DEVICE}\n</device>")), ["line 3", "device"];
    a_definition_in_a_device_is_refused: in_device("<def name=\"a\">\n</def>"), ["line 3", "def"];
    a_device_in_a_definition_is_refused: in_pool(&format!("<def name=\"a\">\n{DEVICE}\n</device>\n</def>")), ["line 3", "device"];
    a_definition_in_a_definition_is_refused: in_pool("<def name=\"a\">\n<def name=\"b\">\n</def>\n</def>"), ["line 3", "def"];
    a_reference_in_a_definition_is_refused:
        in_pool(&format!("<def name=\"a\">{ONE}</def>\n<def name=\"b\">\n<ref name=\"a\"/>\n</def>")), ["line 4", "ref"];
    a_reference_outside_of_a_device_is_refused: in_pool(&format!("<def name=\"a\">{ONE}</def>\n<ref name=\"a\"/>")), ["line 3", "ref"];
    a_mapping_outside_of_a_device_is_refused: in_pool(ONE), ["line 2", "mapping"];
    a_mapping_before_the_superblock_is_refused: format!("{ONE}\n{}", plain()), ["line 1"];
    a_device_before_the_superblock_is_refused: format!("{DEVICE}\n</device>\n{}", plain()), ["line 1", "superblock"];
    a_device_behind_the_superblock_is_refused: format!("{}{DEVICE}\n</device>\n", plain()), ["line 6"];
    a_superblock_in_a_superblock_is_refused: in_pool(&format!("{POOL}\n</superblock>")), ["line 2", "superblock"];
    a_second_superblock_is_refused: plain() + &plain(), ["line 6", "superblock"];

    /// 1.3.3 mixes the time into the number of the data block.
    a_time_of_32_bits_is_refused:
        in_device("<single_mapping origin_block=\"0\" data_block=\"0\" time=\"4294967295\"/>"), ["line 3", "attribute time", "16777215"];
    a_time_past_24_bits_is_refused:
        plain().replace("time=\"5\" tr", "time=\"16777216\" tr"), ["line 1", "attribute time", "16777215"];
    a_time_past_32_bits_is_refused:
        in_device("<single_mapping origin_block=\"0\" data_block=\"0\" time=\"4294967296\"/>"), ["line 3", "attribute time"];
    a_time_past_the_clock_is_refused:
        in_device(&format!("{ONE}\n<single_mapping origin_block=\"1\" data_block=\"1\" time=\"6\"/>")), ["line 4", "attribute time", "superblock's time 5"];
    a_creation_time_past_24_bits_is_refused: plain().replace("creation_time=\"0\"", "creation_time=\"16777216\""), ["line 2", "attribute creation_time"];
    a_snap_time_past_24_bits_is_refused: plain().replace("snap_time=\"0\"", "snap_time=\"4294967295\""), ["line 2", "attribute snap_time"];

    /// 1.3.3 replaces the first silently.
    a_device_that_stands_twice_is_refused: plain().replace("</device>", &format!("</device>\n{DEVICE}\n</device>")), ["line 5", "attribute dev_id", "0"];
    /// 1.3.3 and 0.9 take it.
    a_device_id_past_24_bits_is_refused: plain().replace("dev_id=\"0\"", "dev_id=\"99999999\""), ["line 2", "attribute dev_id", "16777215"];
    a_device_id_of_2_to_the_24_is_refused: plain().replace("dev_id=\"0\"", "dev_id=\"16777216\""), ["line 2", "attribute dev_id"];

    /// 1.3.3 says "block out of bounds".
    a_data_block_past_the_end_is_refused:
        in_device("<single_mapping origin_block=\"0\" data_block=\"1000\" time=\"0\"/>"), ["line 3", "attribute data_block", "1000"];
    a_range_past_the_end_is_refused:
        in_device("<range_mapping origin_begin=\"0\" data_begin=\"990\" length=\"11\" time=\"0\"/>"), ["line 3", "attribute length", "1000"];
    a_range_of_2_to_the_64_is_refused:
        in_device("<range_mapping origin_begin=\"0\" data_begin=\"1\" length=\"18446744073709551615\" time=\"0\"/>"), ["line 3"];
    a_range_past_the_last_virtual_block_is_refused:
        in_device("<range_mapping origin_begin=\"18446744073709551615\" data_begin=\"0\" length=\"2\" time=\"0\"/>"), ["line 3"];
    a_length_of_0_is_refused: in_device("<range_mapping origin_begin=\"0\" data_begin=\"0\" length=\"0\" time=\"0\"/>"), ["line 3", "attribute length"];
    /// 1.3.3 says "keys out of order", with no place.
    overlapping_ranges_are_refused:
        in_device("<range_mapping origin_begin=\"0\" data_begin=\"0\" length=\"10\" time=\"0\"/>\n<range_mapping origin_begin=\"9\" data_begin=\"20\" length=\"10\" time=\"0\"/>"),
        ["line 4", "attribute origin_begin", "9"];
    /// 0.9 keeps the last one and leaks a block.
    a_virtual_block_that_stands_twice_is_refused: in_device(&format!("{ONE}\n{ONE}")), ["line 4", "attribute origin_block"];
    mappings_out_of_order_are_refused:
        in_device(&format!("<single_mapping origin_block=\"7\" data_block=\"1\" time=\"0\"/>\n{ONE}")), ["line 4", "attribute origin_block"];
    a_definition_that_stands_twice_is_refused: in_pool("<def name=\"a\">\n</def>\n<def name=\"a\">\n</def>"), ["line 4", "attribute name", "a"];
    a_reference_to_nothing_is_refused: in_device("<ref name=\"nowhere\"/>"), ["line 3", "attribute name", "nowhere"];
    a_reference_before_its_definition_is_refused:
        in_pool(&format!("{DEVICE}\n<ref name=\"a\"/>\n</device>\n<def name=\"a\">{ONE}</def>")), ["line 3", "attribute name"];
    a_reference_that_overlaps_is_refused:
        in_pool(&format!("<def name=\"a\">{ONE}</def>\n{DEVICE}\n{ONE}\n<ref name=\"a\"/>\n</device>")), ["line 5", "attribute name", "a"];
    a_mapping_that_overlaps_a_reference_is_refused:
        in_pool(&format!("<def name=\"a\">{ONE}</def>\n{DEVICE}\n<ref name=\"a\"/>\n{ONE}\n</device>")), ["line 5", "attribute origin_block"];
    the_same_reference_twice_in_a_device_is_refused:
        in_pool(&format!("<def name=\"a\">{ONE}</def>\n{DEVICE}\n<ref name=\"a\"/>\n<ref name=\"a\"/>\n</device>")), ["line 5", "attribute name"];

    /// 1.3.3 panics or runs out of memory.
    data_devices_of_2_to_the_64_blocks_are_refused:
        plain().replace("\"1000\"", "\"18446744073709551615\""), ["line 1", "attribute nr_data_blocks"];
    data_devices_of_2_to_the_40_blocks_are_refused:
        plain().replace("\"1000\"", "\"1099511627776\""), ["line 1", "attribute nr_data_blocks"];
}

#[test]
fn data_block_sizes_that_no_table_can_have_are_refused() {
    for size in [
        "0",
        "7",
        "64",
        "127",
        "192",
        "2097280",
        "4294967295",
        "4294967296",
    ] {
        let xml = plain().replace("\"128\"", &format!("\"{size}\""));
        refused(xml, &["line 1", "attribute data_block_size"]);
    }
    for size in ["128", "384", "2097152"] {
        accepted(plain().replace("\"128\"", &format!("\"{size}\"")));
    }
}

#[test]
fn each_attribute_that_is_missing_is_named() {
    for (line, names) in [
        (
            1,
            &[
                "uuid",
                "time",
                "transaction",
                "data_block_size",
                "nr_data_blocks",
            ][..],
        ),
        (
            2,
            &[
                "dev_id",
                "mapped_blocks",
                "transaction",
                "creation_time",
                "snap_time",
            ],
        ),
        (3, &["origin_block", "data_block", "time"]),
    ] {
        for name in names {
            let text = plain();
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            let at = lines[line - 1]
                .find(&format!(" {name}="))
                .expect("the attribute is there");
            let end = lines[line - 1][at..]
                .match_indices('"')
                .nth(1)
                .expect("its value ends")
                .0
                + at
                + 1;
            lines[line - 1].replace_range(at..end, "");
            refused(
                lines.join("\n"),
                &[&format!("line {line}, attribute {name}")],
            );
        }
    }
}

#[test]
fn what_is_no_number_is_named() {
    for value in [
        "",
        " ",
        "x",
        "-1",
        "+1",
        "0x10",
        "1e3",
        "1.0",
        " 1",
        "1 ",
        "1_000",
        "٣",
        "18446744073709551616",
        "99999999999999999999999",
    ] {
        for (line, before, name) in [
            (1, "nr_data_blocks=\"1000\"", "nr_data_blocks"),
            (2, "mapped_blocks=\"1\"", "mapped_blocks"),
            (3, "origin_block=\"0\"", "origin_block"),
        ] {
            let xml = plain().replace(before, &format!("{name}=\"{value}\""));
            refused(xml, &[&format!("line {line}, attribute {name}")]);
        }
    }
}

#[test]
fn numbers_with_leading_zeros_are_decimal() {
    assert_eq!(
        accepted(plain().replace("\"1000\"", "\"0001000\"")),
        Pool::read(&plain())
    );
    let octal = in_device("<single_mapping origin_block=\"010\" data_block=\"007\" time=\"00\"/>");
    assert_eq!(accepted(octal).devices[&0].1, [(10, 7, 1, 0)]);
}

#[test]
fn the_line_of_a_fault_is_right_far_into_the_input() {
    let many = |count: usize| -> Vec<String> {
        (0..count)
            .map(|i| {
                format!(
                    "    <single_mapping origin_block=\"{i}\" data_block=\"{}\" time=\"0\"/>",
                    i % 1000
                )
            })
            .collect()
    };
    for line in [10, 9_000, 40_000, 79_990] {
        let mut lines = many(80_000);
        lines[line - 3] = lines[line - 3].replace("time=\"0\"", "time=\"6\"");
        refused(
            in_device(&lines.join("\n")),
            &[&format!("line {line}, attribute time")],
        );
        lines[line - 3] = "    <oops/>".to_owned();
        refused(
            in_device(&lines.join("\n")),
            &[&format!("line {line}:"), "oops"],
        );
    }
}

#[test]
fn a_tag_without_an_end_is_refused_in_bounded_memory() {
    let xml = format!("{POOL}\n{DEVICE}\n<single_mapping {}", "a".repeat(64 << 20));
    let done = refused(xml, &["line"]);
    assert!(done.peak < 100_000, "{} KiB of memory", done.peak);
    let xml = format!("{POOL}\n{DEVICE}\n{}", "a".repeat(64 << 20));
    let done = refused(xml, &["line"]);
    assert!(done.peak < 200_000, "{} KiB of memory", done.peak);
}

#[test]
fn memory_does_not_grow_with_the_input() {
    // 1.3.3 holds all of the input.
    let mut xml = format!("{POOL}\n").replace("\"1000\"", "\"2000000\"");
    for device in 0..8 {
        xml += &format!(
            "<device dev_id=\"{device}\" mapped_blocks=\"100000\" transaction=\"0\" creation_time=\"0\" snap_time=\"0\">\n"
        );
        for i in 0..100_000 {
            xml += &format!(
                "<single_mapping origin_block=\"{}\" data_block=\"{i}\" time=\"0\"/>\n",
                2 * i
            );
        }
        xml += "</device>\n";
    }
    xml += "</superblock>\n";
    assert!(xml.len() > 45 << 20);
    let image = Image::empty(8192);
    let input = image.beside("input.xml");
    fs::write(&input, &xml).expect("written");
    let done = restore(&input, image.path()).expect(0);
    assert!(
        done.peak < 40_000,
        "{} KiB of memory for {} KiB of XML",
        done.peak,
        xml.len() / 1024
    );
    sound(&image);
}

#[test]
fn an_absurd_range_ends_at_once() {
    let xml = plain().replace("\"1000\"", "\"100000000\"").replace(
        ONE,
        "<range_mapping origin_begin=\"0\" data_begin=\"0\" length=\"100000000\" time=\"0\"/>",
    );
    let (done, is_unchanged) = try_restore(xml.as_bytes());
    assert!(is_unchanged);
    assert_eq!(done.code, Some(1), "{}", done.stderr);
}

#[test]
fn truncated_xml_is_an_error_wherever_it_ends() {
    for name in [
        "snap-mix-a/meta.dump-1.3.3.xml",
        "snap-mix-b/meta.dump-0.9.xml",
    ] {
        let text = expand_text(name);
        let text = text.trim_end();
        let image = Image::of("empty-2m/meta");
        let before = image.bytes();
        let input = image.beside("input.xml");
        // A hundred places all over, and each of the last characters.
        let places = (0..100)
            .map(|i| i * text.len() / 100)
            .chain(text.len() - 20..text.len());
        for place in places {
            fs::write(&input, &text[..place]).expect("written");
            restore(&input, image.path()).expect(5);
            assert!(
                image.bytes() == before,
                "cut at {place}: the output was changed"
            );
        }
        fs::write(&input, text).expect("written");
        restore(&input, image.path()).expect(0);
    }
}

#[test]
fn a_missing_line_is_a_warning_or_an_error_but_never_unsound() {
    let text = expand_text("snap-mix-b/meta.dump-1.3.3.xml");
    let lines: Vec<&str> = text.lines().collect();
    let image = Image::of("empty-2m/meta");
    let input = image.beside("input.xml");
    for missing in (0..lines.len()).step_by(lines.len() / 60) {
        let rest: Vec<&str> = lines
            .iter()
            .enumerate()
            .filter(|(i, _)| *i != missing)
            .map(|(_, line)| *line)
            .collect();
        fs::write(&input, rest.join("\n")).expect("written");
        let done = restore(&input, image.path());
        match done.code {
            Some(0) => sound(&image),
            Some(5) => {}
            _ => panic!("without line {missing}: {done:?}"),
        }
    }
}

same_as_plain! {
    a_plain_dump_is_read: plain();
    a_declaration_is_accepted: format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}", plain());
    a_declaration_with_standalone_is_accepted: format!("<?xml version='1.0' standalone='yes'?>{}", plain());
    a_processing_instruction_is_accepted: format!("<?xml version=\"1.0\"?>\n<?made by=\"hand\"?>\n{}", plain());
    a_byte_order_mark_is_accepted: format!("\u{feff}{}", plain());
    a_byte_order_mark_before_a_declaration_is_accepted: format!("\u{feff}<?xml version=\"1.0\"?>\n{}", plain());
    comments_everywhere_are_accepted:
        format!("<!-- a -->{}<!-- z -->", plain().replace('\n', "\n<!-- between --> <!----> \n"));
    comments_with_tags_in_them_are_accepted:
        plain().replace(ONE, &format!("<!-- {ONE} </device> </superblock> <oops -> > <!- -->\n{ONE}"));
    comments_of_dashes_and_brackets_are_accepted: plain().replace(ONE, &format!("<!-- - -> -- > ]]> ?> \" ' & -->{ONE}<!---->"));
    comments_of_several_mebibytes_are_accepted: plain().replace(ONE, &format!("<!-- {} -->{ONE}", "<oops>\n".repeat(400_000)));
    several_mebibytes_of_white_space_are_accepted: plain().replace(ONE, &format!("{}{ONE}", " \n\t".repeat(1_000_000)));
    dos_line_ends_are_accepted: plain().replace('\n', "\r\n");
    no_line_ends_are_accepted: plain().replace('\n', "");
    tabs_are_accepted: plain().replace('\n', "\n\t").replace("\" ", "\"\t");
    no_final_newline_is_accepted: plain().trim_end();
    blank_lines_at_the_end_are_accepted: plain() + "\n\n \t\r\n";
    single_quotes_are_accepted: plain().replace('"', "'");
    space_around_the_equals_sign_is_accepted: plain().replace('=', " = ");
    line_ends_between_attributes_are_accepted: plain().replace("\" ", "\"\n   ");
    space_before_the_end_of_a_tag_is_accepted: plain().replace("/>", " />").replace("\">", "\" >").replace("e>", "e >").replace("k>", "k >");
    reordered_attributes_are_accepted:
        plain().replace(ONE, "<single_mapping time=\"0\" data_block=\"0\" origin_block=\"0\"/>")
            .replace("time=\"5\" transaction=\"3\"", "transaction=\"3\" time=\"5\"");
    character_references_are_accepted: plain().replace("\"1000\"", "\"&#49;00&#x30;\"").replace("origin_block=\"0\"", "origin_block=\"&#48;\"");
    a_range_of_one_block_is_accepted: plain().replace(ONE, "<range_mapping origin_begin=\"0\" data_begin=\"0\" length=\"1\" time=\"0\"/>");
    mappings_as_pairs_of_tags_are_accepted:
        plain().replace(ONE, "<single_mapping origin_block=\"0\" data_block=\"0\" time=\"0\"></single_mapping>");
    mappings_as_pairs_of_tags_with_space_between_are_accepted:
        plain().replace(ONE, "<range_mapping origin_begin=\"0\" data_begin=\"0\" length=\"1\" time=\"0\">\n  <!-- none -->\n</range_mapping>");
    an_unused_definition_is_accepted: plain().replace(DEVICE, &format!("<def name=\"unused\">{ONE}</def>{DEVICE}"));
    an_empty_definition_is_accepted: plain().replace(DEVICE, &format!("<def name=\"e\"/><def name=\"f\"></def>{DEVICE}<ref name=\"e\"/>"));
    a_reference_as_a_pair_of_tags_is_accepted:
        plain().replace(ONE, "<ref name=\"a\"></ref>").replace(DEVICE, &format!("<def name=\"a\">{ONE}</def>{DEVICE}"));
    names_with_entities_are_accepted:
        plain().replace(ONE, "<ref name=\"a&amp;&lt;&quot;b'\"/>").replace(DEVICE, &format!("<def name='a&#38;&lt;\"b&apos;'>{ONE}</def>{DEVICE}"));
    names_that_are_empty_or_not_ascii_are_accepted:
        plain().replace(ONE, "<ref name=\"\"/><ref name=\"ä/☃ >\"/>")
            .replace(DEVICE, &format!("<def name=\"ä/☃ >\"></def><def name=\"\">{ONE}</def>{DEVICE}"));
    metadata_snap_is_ignored: plain().replace(" version", " metadata_snap=\"40\" version");
    a_version_left_out_is_2: plain().replace(" version=\"2\"", "");
    needs_check_is_not_restored: plain().replace(" version", " flags=\"1\" version");
}

#[test]
fn an_empty_device_may_be_one_tag() {
    let xml = in_pool(
        "<device dev_id=\"7\" mapped_blocks=\"0\" transaction=\"1\" creation_time=\"2\" snap_time=\"3\"/>",
    );
    let pool = accepted(xml);
    assert_eq!(pool.devices[&7].1, []);
    assert_eq!(pool.devices[&7].0["snap_time"], "3");
}

#[test]
fn an_empty_pool_may_be_one_tag() {
    assert_eq!(accepted(POOL.replace("\">", "\"/>")).devices.len(), 0);
}

#[test]
fn devices_may_come_in_any_order() {
    let device = |id: u32| {
        format!(
            "<device dev_id=\"{id}\" mapped_blocks=\"0\" transaction=\"0\" creation_time=\"0\" snap_time=\"0\"/>\n"
        )
    };
    let ids = [9, 3, 16_777_215, 0, 77];
    let pool = accepted(in_pool(&ids.map(device).concat()));
    assert_eq!(
        pool.devices.keys().copied().collect::<Vec<u64>>(),
        [0, 3, 9, 77, 16_777_215]
    );
}

#[test]
fn the_uuid_is_kept() {
    for uuid in ["0123456789abcdef", "pool's id"] {
        let xml = plain().replace("uuid=\"\"", &format!("uuid=\"{uuid}\""));
        let image = Image::restored(&xml, 64);
        let mut wanted = [0; 16];
        wanted[..uuid.len()].copy_from_slice(uuid.as_bytes());
        assert_eq!(image.superblock().uuid, wanted);
        let again = Image::restored(&dump(&[], image.path()).expect(0).out(), 64);
        assert_eq!(again.superblock().uuid, wanted);
    }
}

#[test]
fn mapped_blocks_are_counted_anew_with_a_warning() {
    for wrong in ["0", "2", "18446744073709551615"] {
        let image = Image::empty(64);
        let input = image.beside("input.xml");
        fs::write(
            &input,
            plain().replace("mapped_blocks=\"1\"", &format!("mapped_blocks=\"{wrong}\"")),
        )
        .expect("written");
        let done = restore(&input, image.path()).expect(0).expect_stderr(&[
            "warning",
            "device 0",
            "mapped_blocks",
            wrong,
        ]);
        assert_eq!(done.stderr.lines().count(), 1, "said once: {}", done.stderr);
        sound(&image);
        assert_eq!(image.dumped().devices[&0].0["mapped_blocks"], "1");
    }
}

#[test]
fn the_extremes_of_every_number_are_kept() {
    let xml = "<superblock uuid=\"\" time=\"16777215\" transaction=\"18446744073709551615\" version=\"2\" data_block_size=\"2097152\" nr_data_blocks=\"1000\">\n\
        <device dev_id=\"16777215\" mapped_blocks=\"2\" transaction=\"18446744073709551615\" creation_time=\"16777215\" snap_time=\"16777215\">\n\
        <single_mapping origin_block=\"0\" data_block=\"999\" time=\"16777215\"/>\n\
        <single_mapping origin_block=\"18446744073709551614\" data_block=\"0\" time=\"0\"/>\n\
        </device>\n</superblock>\n";
    assert_eq!(accepted(xml), Pool::read(xml));
}

#[test]
fn comments_are_read_wherever_a_chunk_ends() {
    for offset in -9_isize..=9 {
        for marked in ["<!-- <oops> -->", "<!---->", "<?note x?>", ONE] {
            // The beginning of the mark, or its end, lies at the end of a chunk.
            for at in [
                CHUNK.strict_add_signed(offset),
                CHUNK.strict_add_signed(offset) - marked.len(),
            ] {
                let head = format!("{POOL}\n{DEVICE}\n");
                let rest = if marked == ONE { "" } else { ONE };
                let xml = format!(
                    "{head}{}{marked}{rest}\n</device>\n</superblock>\n",
                    " ".repeat(at - head.len())
                );
                let image = Image::empty(64);
                let input = image.beside("input.xml");
                fs::write(&input, xml).expect("written");
                let done = restore(&input, image.path());
                assert_eq!(done.code, Some(0), "{marked} at {at}: {}", done.stderr);
                assert_eq!(done.stderr, "", "{marked} at {at}");
            }
        }
    }
}

#[test]
fn brackets_in_values_are_read_wherever_a_chunk_ends() {
    for offset in -3_isize..=3 {
        let at = CHUNK.strict_add_signed(offset);
        let head = format!("{POOL}\n");
        let name = "a>b>c";
        let open = "<def name=\"";
        let padding = " ".repeat(at - head.len() - open.len() - 2);
        let xml = format!(
            "{head}{padding}{open}{name}\">{ONE}</def>\n{DEVICE}\n<ref name=\"{name}\"/>\n</device>\n</superblock>\n"
        );
        let image = Image::empty(64);
        let input = image.beside("input.xml");
        fs::write(&input, &xml).expect("written");
        let done = restore(&input, image.path());
        assert_eq!(done.code, Some(0), "bracket at {}: {}", at - 1, done.stderr);
    }
}

#[test]
fn bytes_behind_the_end_are_refused_wherever_a_chunk_ends() {
    for offset in -2_isize..=2 {
        let text = plain();
        let at = CHUNK.strict_add_signed(offset);
        let padding = " ".repeat(at - text.len());
        for behind in ["x", "<oops/>", "<", "</superblock>"] {
            let (done, is_unchanged) = try_restore(format!("{text}{padding}{behind}").as_bytes());
            assert_eq!(
                (done.code, is_unchanged),
                (Some(5), true),
                "{behind} at {at}: {}",
                done.stderr
            );
        }
    }
}

/// `thin_restore -i INPUT -o OUTPUT` that is not run yet.
fn call(input: &Path, output: &Path) -> Call {
    thintools([
        "thin_restore".as_ref(),
        "-i".as_ref(),
        input.as_os_str(),
        "-o".as_ref(),
        output.as_os_str(),
    ])
}

#[test]
fn standard_input_may_be_a_pipe() {
    let text = expand_text("snap-mix-a/meta.dump-1.3.3.xml");
    let image = Image::empty(1024);
    call("-".as_ref(), image.path())
        .stdin(text.as_str())
        .run()
        .expect(0);
    sound(&image);
    assert!(image.dumped() == Pool::read(&text));
    // And one that ends too early, or holds nothing.
    for end in [0, 100, text.len() / 2] {
        let before = image.bytes();
        call("-".as_ref(), image.path())
            .stdin(&text[..end])
            .run()
            .expect(5)
            .expect_stderr(&["standard input"]);
        assert!(image.bytes() == before);
    }
    let device = Image::empty(1024);
    call("/dev/stdin".as_ref(), device.path())
        .stdin(text.as_str())
        .run()
        .expect(0);
}

#[test]
fn the_input_may_be_a_fifo() {
    let text = expand_text("snap-mix-a/meta.dump-0.9.xml");
    let image = Image::empty(1024);
    let fifo = image.beside("fifo");
    crate::support::program("mkfifo", [&fifo]).run().expect(0);
    let to = fifo.clone();
    let sent = text.clone();
    let writer = thread::spawn(move || {
        let mut file = fs::File::options().write(true).open(to).expect("opened");
        for part in sent.as_bytes().chunks(7001) {
            file.write_all(part).expect("written");
        }
    });
    call(&fifo, image.path())
        .timeout(Duration::from_secs(60))
        .run()
        .expect(0);
    writer.join().expect("everything was read");
    assert!(image.dumped() == Pool::read(&text));
}

#[test]
fn the_input_may_be_a_deleted_file_that_lvm_has_open() {
    let text = plain();
    let file = tempfile::tempfile().expect("made");
    file.write_all_at(text.as_bytes(), 0).expect("written");
    let path = {
        use std::os::fd::AsRawFd;
        format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
    };
    let image = Image::empty(64);
    restore(path.as_ref(), image.path()).expect(0);
    assert_eq!(image.dumped(), Pool::read(&text));
}

#[test]
fn the_output_is_never_the_input() {
    let image = Image::of("snap-mix-a/meta");
    let xml = image.beside("pool.xml");
    fs::write(&xml, plain()).expect("written");
    let link = image.beside("link.xml");
    std::os::unix::fs::symlink(&xml, &link).expect("linked");
    let hard = image.beside("hard.xml");
    fs::hard_link(&xml, &hard).expect("linked");
    for output in [&xml, &link, &hard] {
        let done = restore(&xml, output);
        assert_ne!(done.code, Some(0));
        assert_eq!(
            fs::read_to_string(&xml).expect("read"),
            plain(),
            "the input is as it was"
        );
    }
}

#[test]
fn an_output_that_is_too_small_is_left_as_it_was_and_told_the_size() {
    let text = expand_text("snap-mix-a/meta.dump-1.3.3.xml");
    let image = Image::of("snap-mix-a/meta");
    let input = image.beside("input.xml");
    fs::write(&input, &text).expect("written");
    let mut least = 0;
    for blocks in 0..64 {
        image.resize(blocks);
        let before = image.bytes();
        let done = restore(&input, image.path());
        if done.code == Some(0) {
            least = blocks;
            break;
        }
        assert!(
            done.code == Some(1) || done.code == Some(5),
            "{blocks} blocks: {}",
            done.stderr
        );
        assert!(
            image.bytes() == before,
            "{blocks} blocks: the output was changed"
        );
        if blocks > 10 {
            assert!(
                done.stderr.contains("blocks") && done.stderr.contains("bytes"),
                "{}",
                done.stderr
            );
        }
    }
    assert!(least > 10, "it fits {least} blocks");
    sound(&image);
    // The size that the message names is enough.
    image.resize(5);
    let told = restore(&input, image.path()).stderr;
    assert!(
        told.contains(&format!("needs {least} blocks")),
        "it needs {least} blocks: {told}"
    );
}

#[test]
fn outputs_that_cannot_be_are_refused() {
    let image = Image::empty(64);
    let input = image.beside("input.xml");
    fs::write(&input, plain()).expect("written");
    assert_ne!(restore(&input, &image.beside("missing")).code, Some(0));
    assert!(!image.beside("missing").exists());
    assert_ne!(
        restore(&input, image.path().parent().expect("a folder")).code,
        Some(0)
    );
    assert_ne!(restore(&input, "/dev/null".as_ref()).code, Some(0));
    assert_ne!(
        restore(&image.beside("missing.xml"), image.path()).code,
        Some(0)
    );
    assert_ne!(
        restore(image.path().parent().expect("a folder"), image.path()).code,
        Some(0)
    );
}

#[test]
fn more_data_blocks_than_the_dump_has_get_their_bitmaps() {
    // 1.3.3 patches the size and leaves too few bitmaps.
    let image = Image::empty(64);
    let input = image.beside("input.xml");
    fs::write(&input, plain()).expect("written");
    let mut all = vec!["thin_restore", "-i"];
    let (from, to) = (
        input.to_str().expect("text"),
        image.path().to_str().expect("text"),
    );
    all.extend([
        from,
        "-o",
        to,
        "--nr-data-blocks",
        "200000",
        "--transaction-id",
        "44",
        "--data-block-size",
        "256",
    ]);
    thintools(all).run().expect(0);
    sound(&image);
    let superblock = image.dumped().superblock;
    assert_eq!(superblock["nr_data_blocks"], "200000");
    assert_eq!(superblock["transaction"], "44");
    assert_eq!(superblock["data_block_size"], "256");
}

#[test]
fn lowered_overrides_are_not_followed_and_said_so() {
    let image = Image::empty(64);
    let input = image.beside("input.xml");
    fs::write(&input, plain()).expect("written");
    let (from, to) = (
        input.to_str().expect("text"),
        image.path().to_str().expect("text"),
    );
    let all = [
        "thin_restore",
        "-i",
        from,
        "-o",
        to,
        "--nr-data-blocks",
        "10",
        "--transaction-id",
        "1",
    ];
    thintools(all)
        .run()
        .expect(0)
        .expect_stderr(&["transaction id stays 3", "data blocks stays 1000"]);
    assert_eq!(image.dumped().superblock["nr_data_blocks"], "1000");
}

#[test]
fn illegal_overrides_are_refused_before_anything_is_opened() {
    for size in ["0", "7", "64", "192", "2097280", "x"] {
        let all = [
            "thin_restore",
            "-i",
            "/no/such",
            "-o",
            "/no/such",
            "--data-block-size",
            size,
        ];
        thintools(all).run().expect(2);
    }
}

/// One stretch of mappings: a gap before it, its length, its first data block, its time.
type Stretch = (u64, u64, u64, u32);

/// What stands in a device.
#[derive(Clone, Debug)]
enum Item {
    Run(Stretch),
    Reference(usize),
}

/// A pool out of thin air. Items that would not fit where they stand are left out when it is written.
#[derive(Clone, Debug)]
struct Random {
    definitions: Vec<(u64, Vec<Stretch>)>,
    devices: Vec<(u64, Vec<Item>)>,
}

const DATA_BLOCKS: u64 = 40_000;
const CLOCK: u32 = 9;

fn stretch() -> impl Strategy<Value = Stretch> {
    let gap = prop_oneof![Just(0), 1..4_u64, 1..3000_u64];
    let length = prop_oneof![4 => 1..4_u64, 2 => 1..90_u64, 1 => 80..700_u64];
    (gap, length, 0..DATA_BLOCKS - 700, 0..=CLOCK)
}

fn random() -> impl Strategy<Value = Random> {
    let definition = (0..6000_u64, prop::collection::vec(stretch(), 0..12));
    let item = prop_oneof![
        3 => stretch().prop_map(Item::Run),
        2 => (0..8_usize).prop_map(Item::Reference),
    ];
    let ids = prop_oneof![0..20_u64, 0..=16_777_215_u64];
    let device = (ids, prop::collection::vec(item, 0..16));
    (
        prop::collection::vec(definition, 0..8),
        prop::collection::vec(device, 0..10),
    )
        .prop_map(|(mut definitions, devices)| {
            // So that a device can refer to several of them.
            definitions.sort_by_key(|d| d.0);
            Random {
                definitions,
                devices,
            }
        })
}

/// Writes a stretch that begins after `next`, and returns where it ends.
fn write(xml: &mut String, next: u64, (gap, length, data, time): Stretch) -> u64 {
    let begin = next + gap;
    *xml += &if length == 1 {
        format!(
            "<single_mapping origin_block=\"{begin}\" data_block=\"{data}\" time=\"{time}\"/>\n"
        )
    } else {
        format!(
            "<range_mapping origin_begin=\"{begin}\" data_begin=\"{data}\" length=\"{length}\" time=\"{time}\"/>\n"
        )
    };
    begin + length
}

impl Random {
    fn xml(&self) -> String {
        let mut xml = format!(
            "<superblock uuid=\"\" time=\"{CLOCK}\" transaction=\"7\" version=\"2\" data_block_size=\"128\" nr_data_blocks=\"{DATA_BLOCKS}\">\n"
        );
        let mut known = Vec::new();
        for (i, (begin, stretches)) in self.definitions.iter().enumerate() {
            xml += &format!("<def name=\"{i}\">\n");
            let first = begin + stretches.first().map_or(0, |s| s.0);
            let mut next = *begin;
            for &stretch in stretches {
                next = write(&mut xml, next, stretch);
            }
            xml += "</def>\n";
            known.push((first, next, stretches.iter().map(|s| s.1).sum::<u64>()));
        }
        let mut seen = std::collections::BTreeSet::new();
        for (id, items) in self.devices.iter().filter(|(id, _)| seen.insert(*id)) {
            let mut inside = String::new();
            let mut next = 0;
            let mut mapped = 0;
            for item in items {
                match *item {
                    Item::Run(stretch) => {
                        next = write(&mut inside, next, stretch);
                        mapped += stretch.1;
                    }
                    Item::Reference(number) => {
                        let Some(&(first, end, count)) =
                            known.get(number).filter(|d| d.0 >= next && d.2 > 0)
                        else {
                            continue;
                        };
                        assert!(first >= next);
                        inside += &format!("<ref name=\"{number}\"/>\n");
                        next = end;
                        mapped += count;
                    }
                }
            }
            xml += &format!(
                "<device dev_id=\"{id}\" mapped_blocks=\"{mapped}\" transaction=\"1\" creation_time=\"2\" snap_time=\"3\">\n{inside}</device>\n"
            );
        }
        xml + "</superblock>\n"
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_pools_come_back_from_sound_metadata(random in random()) {
        let xml = random.xml();
        let image = Image::empty(1024);
        let input = image.beside("input.xml");
        fs::write(&input, &xml).expect("written");
        let done = restore(&input, image.path()).expect(0);
        prop_assert_eq!(done.stderr, "");
        let checked = check(&[], image.path()).expect(0);
        let worse: Vec<_> = damage_lines(&checked.stderr).into_iter().filter(|d| d.0 != "note").collect();
        prop_assert!(worse.is_empty(), "{}", checked.stderr);
        prop_assert!(image.dumped() == Pool::read(&xml), "another pool came back");
        let unshared = dump(&["--no-shared"], image.path()).expect(0).out();
        prop_assert!(!unshared.contains("<ref"));
        prop_assert!(Pool::read(&unshared) == Pool::read(&xml), "another pool came back unshared");
        // What comes back is restored to the same once more.
        fs::write(&input, dump(&[], image.path()).expect(0).stdout).expect("written");
        let again = Image::empty(1024);
        restore(&input, again.path()).expect(0);
        sound(&again);
        prop_assert!(again.dumped() == Pool::read(&xml), "another pool came back the second time");
    }
}

#[test]
fn random_pools_pass_the_check_of_0_9() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    for _ in 0..40 {
        let xml = random()
            .new_tree(&mut runner)
            .expect("a pool")
            .current()
            .xml();
        let image = Image::restored(&xml, 1024);
        crate::support::peer("thin_check", &[image.path().as_os_str()]).expect(0);
        let theirs = crate::support::peer("thin_dump", &[image.path().as_os_str()])
            .expect(0)
            .out();
        assert!(
            Pool::read(&theirs) == Pool::read(&xml),
            "0.9 reads another pool from {xml}"
        );
    }
}
