// The schedule of kernels that stream panels through one or two convolutions: at step k the row first + k of the input
// arrives, row - q1 of the first convolution is complete, and row - q1 - q2 of the second; q is how many rows of the
// input below its own a result needs. A turn is K steps, as many as the filter has rows: it is unrolled, so that
// accumulators rotate by renaming.
//
// The compiler cannot overlap products across a branch in a turn; they wait there for each other. So kernels take their
// schedule as a type, and run the same code for turns whose steps the compiler all knows (KnownTurn) as for those whose
// steps are checked one by one (CheckedTurn).
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "panel.h"

namespace ffnet {

struct StreamRows {
  int first;                     // row of the input at step 0, relative to the segment
  int input_end;                 // steps from here on bring padding only
  int middle_begin, middle_end;  // steps that complete a row of the first convolution that the second reads
  int output_begin;              // the step that completes row 0 of the result
  int lag_middle, lag_output;    // rows between the input's and the completed ones
  int steps;
};

// For one convolution p2 = q2 = 0 and middle_rows = input_rows.
inline StreamRows stream_rows(const PanelShape& p, int input_rows, int middle_rows, int p1, int q1, int p2, int q2) {
  const bool whole = p.segments == 1;  // a whole plane has only padding above its first row and below its last
  StreamRows s{};
  s.lag_middle = q1, s.lag_output = q1 + q2;
  s.first = whole ? 0 : -(p1 + p2);
  s.input_end = (whole ? input_rows : p.segment_rows + q1 + q2) - s.first;
  s.middle_begin = (whole ? 0 : -p2) + q1 - s.first;
  s.middle_end = (whole ? middle_rows : p.segment_rows + q2) + q1 - s.first;
  s.output_begin = q1 + q2 - s.first;
  s.steps = s.output_begin + p.segment_rows;
  return s;
}

// The q that kernels with a known schedule are made for, of filters of so many rows: filled up with rows of zeros above
// to 3 or 7 rows, they reach so many down.
inline int lag_of_known_rows(int filter_rows) { return filter_rows <= 3 ? 1 : 3; }

// The stages of a ring, each with the rows of a turn: all but one are on their way while that is worked on.
template <int K>
constexpr int kStages = K == 7 ? 3 : 5;

// Calls body(0), body(1) ... with constants.
template <class Body, int... I>
FFNET_DEVICE void for_each_constant(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

template <int COUNT, class Body>
FFNET_DEVICE void for_each_constant(const Body& body) {
  for_each_constant(body, std::make_integer_sequence<int, COUNT>());
}

constexpr int kFar = 1 << 20;  // rows: more than are ever looked at

// What is known of the rows of a stage, which are copied in pairs: whether a plane has all or none of a pair.
template <int ROWS, int FIRST, int HEIGHT>
struct KnownRows {
  FFNET_BOTH static constexpr int last(int pair) { return FIRST + (2 * pair + 1 < ROWS ? 2 * pair + 1 : 2 * pair); }
  FFNET_BOTH static constexpr bool all(int pair) { return FIRST + 2 * pair >= 0 && last(pair) < HEIGHT; }
  FFNET_BOTH static constexpr bool none(int pair) { return last(pair) < 0 || FIRST + 2 * pair >= HEIGHT; }
  FFNET_BOTH static constexpr bool nothing() { return FIRST + ROWS <= 0 || FIRST >= HEIGHT; }
  FFNET_BOTH static constexpr bool starts_inside() { return FIRST >= 0; }
};

struct UnknownRows {
  FFNET_BOTH static constexpr bool all(int) { return false; }
  FFNET_BOTH static constexpr bool none(int) { return false; }
  FFNET_BOTH static constexpr bool nothing() { return false; }
  FFNET_BOTH static constexpr bool starts_inside() { return false; }
};

// Whether a turn's fetch is the first of a panel.
enum class Opens { never, always, ask };

// Checks for each step what it does. Nothing is known of planes: their rows are checked, too.
class CheckedTurn {
 public:
  static constexpr bool kInside = false, kFirst = false;
  static constexpr Opens kOpens = Opens::ask;
  template <int MAP>
  using Fetched = UnknownRows;

  FFNET_DEVICE CheckedTurn(const StreamRows& rows, int step) : rows_(rows), step_(step) {}
  FFNET_DEVICE bool input(int i) const { return step_ + i < rows_.input_end; }
  FFNET_DEVICE bool middle(int i) const { return step_ + i >= rows_.middle_begin && step_ + i < rows_.middle_end; }
  FFNET_DEVICE bool output(int i) const { return step_ + i >= rows_.output_begin && step_ + i < rows_.steps; }
  // Whether the row of the first convolution that a step completes is the segment's, and no other one's.
  FFNET_DEVICE bool owns(int i) const {
    return static_cast<unsigned>(middle_row(i)) < static_cast<unsigned>(rows_.steps - rows_.output_begin);
  }
  // Whether there is the row of the input that tap row `ky` of the first convolution takes; else it is zeros.
  FFNET_BOTH static constexpr bool reads(int, int) { return true; }
  // Of the segment.
  FFNET_DEVICE int input_row(int i) const { return rows_.first + step_ + i; }
  FFNET_DEVICE int middle_row(int i) const { return rows_.first + step_ + i - rows_.lag_middle; }
  FFNET_DEVICE int output_row(int i) const { return step_ + i - rows_.output_begin; }

 private:
  const StreamRows& rows_;
  int step_;
};

// Every step does everything.
struct FullTurn : CheckedTurn {
  using CheckedTurn::CheckedTurn;
  FFNET_BOTH static constexpr bool input(int) { return true; }
  FFNET_BOTH static constexpr bool middle(int) { return true; }
  FFNET_BOTH static constexpr bool output(int) { return true; }
};

// Any planes, segments of them and filters. Without FULL every turn is a checked one, for kernels that would otherwise
// spill registers.
template <bool FULL>
struct UnknownSchedule {
  static constexpr bool kKnown = false, kPlane = false;
  static constexpr int kHeight = 0;

  // For a panel; the other schedules know when it ends.
  template <int K>
  FFNET_DEVICE static int turns(const StreamRows& rows) {
    return (rows.steps + K - 1) / K;
  }

  template <int K, int CONVOLUTIONS, int LAG, class Body>
  FFNET_DEVICE static void for_each_turn(const StreamRows& rows, const Body& body) {
    const int full_end = static_cast<int>(smaller(smaller(rows.input_end, rows.middle_end), rows.steps));
    for (int step = 0; step < rows.steps; step += K) {
      if (FULL && step >= rows.output_begin && step + K <= full_end)
        body(FullTurn(rows, step));
      else
        body(CheckedTurn(rows, step));
    }
  }
};
struct AnyRows : UnknownSchedule<true> {};
struct AskedRows : UnknownSchedule<false> {};

// A turn of a whole plane under filters with q = K / 2, after BEFORE of its steps and with LEFT rows of the input to
// come. It fetches the rows of turn FETCHED of a panel, HEIGHT rows high; without FETCHED they are checked. The second
// map is LAG rows behind the first.
template <int K, int CONVOLUTIONS, int LAG, int BEFORE, int LEFT, int FETCHED = -1, int HEIGHT = kFar>
struct KnownTurn {
  static constexpr int kMiddle = K / 2, kOutput = K / 2 * CONVOLUTIONS;  // lags
  static constexpr bool kFirst = BEFORE == 0;
  static constexpr bool kInside = true;
  static constexpr Opens kOpens = FETCHED == 0 ? Opens::always : Opens::never;
  template <int MAP>
  using Fetched =
      std::conditional_t<(FETCHED < 0), UnknownRows, KnownRows<K, FETCHED * K - (MAP == 0 ? 0 : LAG), HEIGHT>>;

  int row;  // of the input at the first step

  FFNET_BOTH static constexpr bool input(int i) { return i < LEFT; }
  FFNET_BOTH static constexpr bool middle(int i) { return BEFORE + i >= kMiddle && i < LEFT + kMiddle; }
  FFNET_BOTH static constexpr bool output(int i) { return BEFORE + i >= kOutput && i < LEFT + kOutput; }
  FFNET_BOTH static constexpr bool owns(int) { return true; }
  FFNET_BOTH static constexpr bool reads(int i, int ky) {
    return BEFORE + i - (K - 1) + ky >= 0 && i - (K - 1) + ky < LEFT;
  }
  FFNET_DEVICE int input_row(int i) const { return row + i; }
  FFNET_DEVICE int middle_row(int i) const { return row + i - kMiddle; }
  FFNET_DEVICE int output_row(int i) const { return row + i - kOutput; }
};

// Whole planes of HEIGHT rows: a panel is straight-line code.
template <int HEIGHT>
struct PlaneRows {
  static constexpr bool kKnown = true, kPlane = true;
  static constexpr int kHeight = HEIGHT;

  template <int K>
  static bool takes(int rows) {
    return rows == HEIGHT;
  }

  template <int K>
  FFNET_DEVICE static int turns(const StreamRows&) {
    return kFar;
  }

  template <int K, int CONVOLUTIONS, int LAG, class Body>
  FFNET_DEVICE static void for_each_turn(const StreamRows&, const Body& body) {
    turns<K, CONVOLUTIONS, LAG>(body, std::make_integer_sequence<int, kTurns<K, CONVOLUTIONS>>());
  }

 private:
  template <int K, int CONVOLUTIONS>
  static constexpr int kTurns = (HEIGHT + K / 2 * CONVOLUTIONS + K - 1) / K;

  template <int K, int CONVOLUTIONS, int LAG, class Body, int... TURN>
  FFNET_DEVICE static void turns(const Body& body, std::integer_sequence<int, TURN...>) {
    constexpr int kAhead = kStages<K> - 1, kAll = kTurns<K, CONVOLUTIONS>;
    static_assert(kAll >= kAhead);
    (body(KnownTurn<K, CONVOLUTIONS, LAG, TURN * K, HEIGHT - TURN * K, (TURN + kAhead) % kAll, HEIGHT>{TURN * K}), ...);
  }
};

// Whole planes of any height with HEIGHT % K == REST, high enough for a loop over their full turns.
template <int REST>
struct HighRows {
  static constexpr bool kKnown = true, kPlane = false;
  static constexpr int kHeight = 0;  // that is not known

  template <int K>
  static bool takes(int rows) {
    return rows % K == REST && rows >= (kStages<K> - 1) * K;
  }

  template <int K>
  FFNET_DEVICE static int turns(const StreamRows&) {
    return kFar;
  }

  template <int K, int CONVOLUTIONS, int LAG, class Body>
  FFNET_DEVICE static void for_each_turn(const StreamRows& rows, const Body& body) {
    constexpr int kAhead = kStages<K> - 1;
    body(KnownTurn<K, CONVOLUTIONS, LAG, 0, kFar>{0});
    const int tail = (rows.steps + K - 1) / K * K - kAhead * K;  // the step from which on the next panel is fetched
#pragma unroll 1
    for (int step = K; step < tail; step += K) body(KnownTurn<K, CONVOLUTIONS, LAG, K, kFar>{step});
    last_turns<K, CONVOLUTIONS, LAG>(tail, body, std::make_integer_sequence<int, kAhead>());
  }

 private:
  template <int K, int CONVOLUTIONS, int LAG, class Body, int... TURN>
  FFNET_DEVICE static void last_turns(int step, const Body& body, std::integer_sequence<int, TURN...>) {
    constexpr int kAhead = kStages<K> - 1;
    constexpr int kLeft = REST + (kAhead - (REST + K / 2 * CONVOLUTIONS + K - 1) / K) * K;  // rows at `step`
    (body(KnownTurn<K, CONVOLUTIONS, LAG, K, kLeft - TURN * K, TURN>{step + TURN * K}), ...);
  }
};

}  // namespace ffnet
